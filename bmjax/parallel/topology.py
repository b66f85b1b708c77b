"""Names of TPU slices: by their shape, as XLA's compiler takes them, and by their size, as Google sells them."""

import math
import re

from bmjax.config import UserError, nearest

# Kinds of chips that XLA's compiler plans for, with the other names that Google gives them.
KINDS = {
    "v4": "v4", "v5e": "v5e", "v5litepod": "v5e", "v5lite": "v5e", "v5p": "v5p", "v6e": "v6e",
    "tpu7x": "tpu7x", "tpu7": "tpu7x", "v7x": "tpu7x", "7x": "tpu7x", "ironwood": "tpu7x",
}  # fmt: skip
NOT_PLANNED = {"v2": "TPU v2", "v3": "TPU v3"}
# Google counts the cores of these in a slice's name, two a chip; of all others the chips.
CORES_A_CHIP = {"v4": 2, "v5p": 2, "tpu7x": 2}
# How many devices a program sees of a chip. TPU7x shows its two cores, each with half of the memory.
DEVICES_A_CHIP = {"tpu7x": 2}
SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES_3D = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16", "16x16x16",
    "16x16x24",
)  # fmt: skip
_GPU = re.compile(
    r"(?:\d+x)?(?:nvidia|tesla|gpu|rtx|gtx|mi\d{3}|gh200|gb200|[ahb]\d{2,3}|l4|l40s?|t4|p100|v100)(?![a-z]).*|[ag]\d-.*"
)
_NAME = re.compile(r"(?:(\d+)x)?([a-z0-9]+?)(?::(\d+(?:x\d+)*)|-(\d+x\d+(?:x\d+)?)|-(\d+))")


def parse_topology(name: str) -> tuple[int, str, str]:
    """Return (slices, kind of chip, shape) of a name like v5p:4x4x4, 2xv6e:16x16, v5p-128 or v5litepod-16.

    Google's sizes stand for the shape that it gives by default: v5p-128 is 64 chips, 4x4x4. Letters may be of any case.

    Raises:
        UserError: for a name of another form, a size that Google does not sell, and chips that cannot be planned for.
    """
    text = name.strip().lower().removeprefix("tpu-")
    match = _NAME.fullmatch(text)
    kind = match[2] if match else re.split(r"[:-]", text)[0]
    if _GPU.fullmatch(text):
        raise UserError(
            f"--topology: {name}: GPUs cannot be planned for: XLA compiles for a GPU only where one is; train a few "
            "steps there, whose log says the memory"
        )
    if kind in NOT_PLANNED:
        known = ", ".join(dict.fromkeys(KINDS.values()))
        raise UserError(f"--topology: {name}: {NOT_PLANNED[kind]} cannot be planned for; {known} can")
    if match is None or match[1] == "0":
        raise UserError(
            f"--topology: '{name}' is not like v5p:4x4x4, v6e:16x16 or 2xv5p:4x4x4 (KIND:SHAPE), nor Google's v5p-128 "
            "or v5litepod-16"
        )
    if kind not in KINDS:
        raise UserError(f"--topology: unknown chip '{kind}'{nearest(kind, list(KINDS))}")
    kind, shape = KINDS[kind], match[3] or match[4]
    if shape is None:
        cores = CORES_A_CHIP.get(kind, 1)
        sizes = {cores * math.prod(map(int, s.split("x"))): s for s in (SHAPES_3D if cores == 2 else SHAPES_2D)}
        if int(match[5]) not in sizes:
            raise UserError(
                f"--topology: {name}: Google has no slice of that size; {match[2]}- "
                f"{', '.join(map(str, sizes))}, or name a shape: {kind}:{shape or sizes[max(sizes)]}"
            )
        shape = sizes[int(match[5])]
    return int(match[1] or 1), kind, shape
