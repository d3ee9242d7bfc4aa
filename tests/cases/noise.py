"""The specs of the noise."""

import torch

from cases.spec import Spec
from fastlm.ops.noise import normal

SPECS = (
    Spec(
        name="normal",
        function=normal,
        dtypes=(torch.float32,),
        backends=("cuda", "triton", "cpu"),
        differentiable=(),
        cases={
            "small": lambda dtype: {"shape": (3, 5), "seed": 7},
            "inside a block": lambda dtype: {"shape": (201,), "seed": -3, "position": 2**40 + 3},
            "empty": lambda dtype: {"shape": (0, 4), "seed": 0},
        },
    ),
)
