"""Bytes that compressed-tensors 0.20.1 wrote, with the weights that it reads from them."""

from __future__ import annotations

# Of each tensor: dtype, shape, bytes.
Stored = tuple[str, tuple[int, ...], str]

COMPRESSED_TENSORS: dict[str, tuple[dict[str, Stored], Stored]] = {
    "pack-3-asymmetric": ({
        "weight_scale": ("bfloat16", (3, 2), (
            "eb3ebd3efc3ef23e233eb43e"
        )),
        "weight_zero_point": ("int32", (1, 2), (
            "d300000094010000"
        )),
        "weight_packed": ("int32", (3, 2), (
            "63461d53e7bafd009cb41bdc9564d200214fe1c38bb5f70a"
        )),
        "weight_shape": ("int64", (2,), (
            "03000000000000001400000000000000"
        )),
    }, ("bfloat16", (3, 20), (
            "0000eb3e6bbf0000eb3eebbeeb3fb0bf0000ebbebd3ebdbe3d3fbd3e3d3fbd3ebd3e8e3fbdbebdbf7c3f"
            "fc3e00000000fc3e1e40fc3f7cbf7c3ffc3e17400000f2bef2bef2bef23e00000000f23e72bfa3be233e"
            "233e233f233e23bef4be233f0000f4beb43eb4be07c087bfb4beb4beb43e000087bfb4be"
    ))),
    "pack-5-channel": ({
        "weight_scale": ("float16", (3, 1), (
            "ce2e08310830"
        )),
        "weight_packed": ("int32", (3, 4), (
            "6fa668db0fb0499765a5322f00000000773e483d4776fed79c93104e050000002ec62a5dabaf4d074c6b"
            "141e06000000"
        )),
        "weight_shape": ("int64", (2,), (
            "03000000000000001400000000000000"
        )),
    }, ("float16", (3, 20), (
            "ceae1a35f4b9ce2e1a391ab5613e61be00001ab5ce32ceb2a83bce324138ce36ce32a83b41b8cebe673c"
            "8c3708b10000083967408c3f08bd8c3b8c37b84008b18cb708b508b50835000000008c378cbb08b40830"
            "08300a39083408b40cb60a3908b00cb60c3608b408c00abd0cb60cb60838000089bc08b8"
    ))),
    "int-8-tensor": ({
        "weight_scale": ("float32", (1,), (
            "8563843c"
        )),
        "weight": ("int8", (3, 6), (
            "477fb4d6e1dbe2ee1839e653ec64352bb24f"
        )),
    }, ("float32", (3, 6), (
            "68de923fbe5a03402e369dbf9fc22dbf694000bf121319bf993af8bef6ef94be4895c63e45d16b3fb821"
            "d7be10b1ab3f667ca5be80dbce3fd4445b3fbbe5313f4a59a1bfd86aa33f"
    ))),
    "float-block": ({
        "weight_scale": ("float32", (2, 2), (
            "5a69473ce44c4e3c17d1da3b0a3ccb3b"
        )),
        "weight": ("float8_e4m3fn", (3, 6), (
            "6c73ede6e2e4e2dc6069e06de477706df575"
        )),
    }, ("float32", (3, 6), (
            "048f953f6e1809409905a2bf2f7c2ebf0ef000bfabb91abfb043f9be048f95be5a69c73e8556603fe44c"
            "cebe799ea73fd11ca4be0624cd3f17d15a3fe3c9313fc820a5bfc820a53f"
    ))),
    "nvfp4": ({
        "weight_global_scale": ("float32", (1,), (
            "6e535944"
        )),
        "weight_packed": ("uint8", (2, 16), (
            "8397fb9d21701c84d7c6bbec2281d84615f4caf40a9c7ac3ff939f40d891ecd6"
        )),
        "weight_scale": ("float8_e4m3fn", (2, 2), (
            "7c7b7e76"
        )),
    }, ("bfloat16", (2, 32), (
            "2a3f00802a4062be2abf2ac0aabf62be623ee23e00002a4062bf623e623f00801b409bbfcf3f4fbf1bbf"
            "1bbf4fbfcfbfcf3ecf3e4f3e008000809bbfcf3f4f3fc63f843e843f46c004bf84bf843f46c004bf0000"
            "84bf84be04bf4640463f84bfc6bfc6bfc63e04bec6bf04be0000043f008046bf043e04be04bf84bf843f"
            "46bf"
    ))),
    "mxfp4": ({
        "weight_packed": ("uint8", (2, 16), (
            "8296fb9c21601b83c6c5badb2281c83515f4caf40a9c7ac3dd828d30b890cab4"
        )),
        "weight_scale": ("uint8", (2, 1), (
            "7e7e"
        )),
    }, ("bfloat16", (2, 32), (
            "003f0080004080be40bf40c080bf80be803e003f0000004040bf803e403f0080004080bfc03f80bf00bf"
            "40bf40bfc0bf003f003f803e0080008080bfc03f403fc03f803e803f40c000bf80bf803f40c000bf0000"
            "80bf80be00bf4040403f80bfc0bfc0bf003f0080c0bf00800000403f008040bf000080be00bf80bf803f"
            "40bf"
    ))),
}  # fmt: skip
