"""A job from its arguments to its report: stage by stage, recorded so that it can be resumed."""
