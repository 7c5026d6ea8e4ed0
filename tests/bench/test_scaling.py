"""The arithmetic of an exchange between GPUs."""

import pytest

from bench.scaling import Network, main

NETWORK = Network(compute_ms=100, gpus_per_node=8, inside=100, between=10, latency_us=10)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (1, 0.0),
        (2, 2 * 1 / 2 * 10 + 0.02),  # 1 GB at 100 GB/s: 10 ms
        (8, 2 * 7 / 8 * 10 + 0.14),
        (16, 2 * 7 / 8 * 10 + 2 * 1 / 2 * 12.5 + 0.16),  # an eighth of it at 10 GB/s: 12.5 ms
    ],
)
def test_an_exchange_is_a_ring_inside_and_one_between(gpus: int, expected: float) -> None:
    assert NETWORK.exchange_ms(10**9, gpus) == pytest.approx(expected)
    assert NETWORK.efficiency(10**9, gpus) == pytest.approx(100 / (100 + expected))


def test_the_table_is_of_the_model_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compute_ms=100", "model=gpt2", "data.path=README.md", "pos=learned"]) == 0
    said = capsys.readouterr().out
    assert "124,439,808 parameters; modelled, not measured" in said
    assert said.splitlines()[-1].split()[0] == "1,024"
    for wrong, why in (
        ("compute_ms=0", "compute_ms=0.0 must be above 0"),
        ("inside=5", "compute_ms is missing"),
    ):
        with pytest.raises(ValueError, match=why):
            main([wrong, "data.path=README.md"])
