"""Runs `MatMulNBits` in an environment that has onnxruntime: `python FILE FOLDER OUT IN BLOCK`.

Reads the operator's inputs from FOLDER's `in.npz`, and leaves its products there as `out.npy`.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def main(folder: Path, out: int, width: int, block: int) -> None:
    arrays = dict(np.load(folder / "in.npz"))
    x = arrays.pop("x")
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", K=width, N=out, bits=4,
        block_size=block, accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one weight",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (len(x), out))],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": x})
    np.save(folder / "out.npy", y)
    packages = ("onnxruntime", "onnx")
    print(json.dumps({name: importlib.metadata.version(name) for name in packages}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
