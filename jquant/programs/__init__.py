"""Programs as JAX traces them: walked equation by equation, laid out straight, and known again."""
