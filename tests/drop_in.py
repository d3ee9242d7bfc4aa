"""What tests of integrations share: proof that fastlm's ops ran, and the oracle's rule with a library's own code as plain."""

from oracle import GRADIENT_FACTOR, ULPS, VALUE_FACTOR, assert_within, ulp_of_largest, worst_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Ops(TorchDispatchMode):
    """``with Ops() as ops`` notes every torch op that runs inside: ``ops.all``, and of them ``ops.fastlm``, ours, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.all.append(str(function.name()))
        return function(*args, **(kwargs or {}))

    @property
    def fastlm(self) -> list[str]:
        return [name.removeprefix("fastlm::") for name in self.all if name.startswith("fastlm::")]


def assert_held(actual: dict[str, Tensor], plain: dict[str, Tensor], golden: dict[str, Tensor]) -> None:
    """Each result is as good as ``plain``, the library's own in the same dtype; ``golden`` is its own in float64.

    A name that starts with "gradient" has the factor of gradients. The dtypes of actual and plain may differ: a KL is float32.
    """
    assert actual.keys() == plain.keys() == golden.keys()
    for what in golden:
        factor = GRADIENT_FACTOR if what.startswith("gradient") else VALUE_FACTOR
        allowed = factor * worst_error(plain[what], golden[what]) + ULPS * ulp_of_largest(golden[what], actual[what].dtype)
        assert_within(actual[what], golden[what], allowed, what)
