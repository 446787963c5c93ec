"""What calibration collects: the gradients autograd gives, the directions a full SVD gives, and nothing left behind in the model."""

from collections.abc import Callable

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.errors import TrainingError
from sdlora.lora import calibrate
from sdlora.lora.calibrate import activations, contrasts, gradients, sample_inputs


class Model(nn.Module):
    """A convolution, a linear layer at every position, and one that is never called; frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.linear = nn.Linear(8, 6)
        self.idle = nn.Linear(8, 6)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.conv(x).movedim(1, -1)
        return self.linear(hidden.tanh())  # type: ignore[no-any-return]

    @property
    def called(self) -> dict[str, nn.Linear | nn.Conv2d]:
        return {"conv": self.conv, "linear": self.linear}


def pictures(number: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(2, 3, 9, 7, generator=generator) for _ in range(number)]


def losses(model: nn.Module) -> list[Callable[[], Tensor]]:
    return [lambda x=x: model(x).square().mean() for x in pictures()]


def assert_untouched(model: Model) -> None:
    for module in (model.conv, model.linear, model.idle):
        assert not module.weight.requires_grad and module.weight.grad is None
        assert not module._forward_pre_hooks and not module.weight._post_accumulate_grad_hooks


COLLECTORS = [
    gradients,
    lambda modules, batches: activations(modules, batches, 2, 0),
    lambda modules, batches: contrasts(modules, batches, batches, 2, 0),
]


def test_gradients_are_the_mean_of_those_of_autograd() -> None:
    model = Model()
    found = gradients(model.called, losses(model))
    assert_untouched(model)
    assert found["conv"].shape == (8, 27) and found["linear"].shape == (6, 8)
    model.requires_grad_(True)
    total = torch.stack([loss() for loss in losses(model)]).mean()
    for name, module in model.called.items():
        (expected,) = torch.autograd.grad(total, [module.weight], retain_graph=True)
        torch.testing.assert_close(found[name], expected.flatten(1))


def test_gradients_by_hand() -> None:
    layer = nn.Linear(2, 1, bias=False).requires_grad_(False)
    inputs = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0])]
    found = gradients({"layer": layer}, [lambda x=x: layer(x).sum() for x in inputs])
    assert found["layer"].tolist() == [[2.0, -1.0]]


def test_one_whole_gradient_at_a_time() -> None:
    """When the error reaches the first layer, the gradients of the layers behind it are gone."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).requires_grad_(False)
    held: list[list[Tensor | None]] = []

    def loss() -> Tensor:
        hidden = model[0](torch.ones(1, 4))
        hidden.register_hook(lambda _: held.append([layer.weight.grad for layer in model]))
        return model[2](model[1](hidden)).sum()  # type: ignore[no-any-return]

    gradients({str(number): layer for number, layer in enumerate(model)}, [loss])
    assert held == [[None, None, None]]


def test_gradients_of_bf16_weights_are_summed_in_fp32() -> None:
    """200 gradients of 1 and one of 1/4: a sum in bf16 would have a unit of 1 at that size."""
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16).requires_grad_(False)
    inputs = [torch.ones(1)] * 200 + [torch.full((1,), 0.25)]
    found = gradients({"layer": layer}, [lambda x=x: layer(x.bfloat16()).float().sum() for x in inputs])["layer"]
    assert found.dtype == torch.float32 and float(found) == pytest.approx(200.25 / 201, rel=1e-6)


def test_gradients_under_autocast_are_near_those_in_fp32() -> None:
    model = Model()

    def cast(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss()

        return run

    exact, found = gradients(model.called, losses(model)), gradients(model.called, [cast(loss) for loss in losses(model)])
    for name in exact:
        assert torch.cosine_similarity(found[name].flatten(), exact[name].flatten(), dim=0) > 0.999


@pytest.mark.parametrize("collect", COLLECTORS)
def test_a_failing_batch_leaves_nothing_behind(collect: Callable[..., object]) -> None:
    model = Model()

    def fail() -> Tensor:
        model(pictures()[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model.called, [*losses(model), fail])
    assert_untouched(model)


def test_a_gradient_that_cannot_be_moved_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(total: Tensor, weight: Tensor) -> None:
        raise MemoryError

    monkeypatch.setattr(calibrate, "_move_gradient", fail)
    model = Model()
    with pytest.raises(MemoryError):
        gradients(model.called, losses(model))
    assert_untouched(model)


@pytest.mark.parametrize("collect", COLLECTORS)
def test_a_layer_without_a_statistic_is_an_error(collect: Callable[..., object]) -> None:
    model = Model()
    with pytest.raises(TrainingError, match="idle is zero in all"):
        collect({**model.called, "idle": model.idle}, losses(model))
    with pytest.raises(TrainingError, match="idle is zero in all"):
        collect({"idle": model.idle}, losses(model))
    with pytest.raises(TrainingError, match="conv is zero in all"):
        collect(model.called, [lambda: model(torch.zeros(1, 3, 9, 7)).square().mean()])
    with pytest.raises(TrainingError, match="not finite"):
        collect(model.called, [lambda: model(torch.full((1, 3, 9, 7), torch.nan)).square().mean()])
    with pytest.raises(TrainingError, match="conv is zero in all"):
        collect(model.called, [])
    assert_untouched(model)


def projector(rows: Tensor) -> Tensor:
    """Onto the space that orthonormal rows span."""
    return rows.T @ rows


def test_activations_are_the_directions_of_a_full_svd() -> None:
    model = Model()
    batches = [lambda x=x: model(x) for x in pictures()]
    found = activations(model.called, batches, 8, 0)
    assert_untouched(model)
    assert found["conv"].shape == (8, 27) and found["linear"].shape == (8, 8)
    rows = torch.cat([F.unfold(x, 3, padding=1, stride=2).mT.reshape(-1, 27) for x in pictures()])
    vh = torch.linalg.svd(rows).Vh
    # 16 of 27 components are kept between calls, so the largest are nearly those of all rows at once.
    captured = (rows @ found["conv"].T).square().sum() / (rows @ vh[:8].T).square().sum()
    assert 0.95 < captured <= 1 + 1e-6
    hidden = torch.cat([model.conv(x).tanh().movedim(1, -1).reshape(-1, 8) for x in pictures()])
    expected = torch.linalg.svd(hidden).Vh
    torch.testing.assert_close((found["linear"] @ expected.T).abs(), torch.eye(8), atol=1e-3, rtol=0)  # nothing was cut off here
    for rows in found.values():
        torch.testing.assert_close(rows @ rows.T, torch.eye(8), atol=1e-5, rtol=0)
        assert (rows.max(dim=1).values >= -rows.min(dim=1).values).all()


def test_the_sketch_keeps_the_largest_components_only() -> None:
    """Rows of lengths 1, 2, 3 and then 4 along axes: three components at most, so the shortest goes."""
    sketch = calibrate._absorb(torch.zeros(0, 5), torch.diag(torch.tensor([1.0, 2, 3, 0, 0]))[:3], 3)
    torch.testing.assert_close(sketch, torch.diag(torch.tensor([1.0, 2, 3, 0, 0]))[[2, 1, 0]])
    sketch = calibrate._absorb(sketch, torch.tensor([[0.0, 0, 0, 4, 0]]), 3)
    torch.testing.assert_close(sketch, torch.diag(torch.tensor([0.0, 2, 3, 4, 0]))[[3, 2, 1]])


def test_activations_by_hand() -> None:
    """Inputs along three axes of lengths 2, 3 and 1, in three calls."""
    layer = nn.Linear(4, 2).requires_grad_(False)
    inputs = [torch.tensor([0.0, -2, 0, 0]), torch.tensor([0.0, 0, 0, 3]), torch.tensor([1.0, 0, 0, 0])]
    found = activations({"layer": layer}, [lambda x=x: layer(x) for x in inputs], 2, 0)
    torch.testing.assert_close(found["layer"], torch.eye(4)[[3, 1]])


def test_inputs_that_span_less_give_fewer_directions() -> None:
    layer = nn.Linear(10, 4).requires_grad_(False)
    found = activations({"layer": layer}, [lambda: layer(torch.randn(1, 10))] * 3, 6, 0)
    assert found["layer"].shape == (3, 10)


def test_activations_span_what_eva_of_peft_spans() -> None:
    """peft subtracts the mean of the rows, so these have the mean zero."""
    generator = torch.Generator().manual_seed(7)
    half = torch.randn(100, 12, generator=generator) * 2.0 ** -torch.arange(12.0)
    x = torch.cat([half, -half])
    layer = nn.Linear(12, 5, bias=False).requires_grad_(False)
    ours = activations({"layer": layer}, [lambda: layer(x)] * 3, 4, 0)["layer"]
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    adapted = peft.get_peft_model(nn.Sequential(layer), config)
    peft.initialize_lora_eva_weights(
        adapted,
        [{"input": x}] * 3,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    theirs = adapted.base_model.model[0].lora_A["default"].weight.detach()
    torch.testing.assert_close(projector(ours), projector(theirs), atol=1e-3, rtol=0)
    torch.testing.assert_close((ours @ theirs.T).abs(), torch.eye(4), atol=1e-3, rtol=0)  # each direction, not the space alone


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": (0, 1)},
        {"kernel_size": (2, 3), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)},
        {"kernel_size": 1},
    ],
)
def test_patches_are_what_the_convolution_multiplies_by_its_weight(options: dict[str, int]) -> None:
    conv = nn.Conv2d(3, 4, bias=False, **options)
    x = torch.randn(2, 3, 8, 11)
    rows = sample_inputs(conv, x, 256, torch.Generator().manual_seed(0))
    outputs = conv(x).movedim(1, -1).reshape(-1, 4)
    products = rows @ conv.weight.flatten(1).T
    assert len(rows) == len(outputs)  # fewer than asked for: each once, in some order
    nearest = torch.cdist(products, outputs).min(dim=1)
    assert nearest.values.max() < 1e-3 and len(set(nearest.indices.tolist())) == len(outputs)


def test_the_sample_is_bounded_and_a_function_of_seed_layer_and_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "ROWS", 5)
    conv, linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(6, 4)
    x, y = torch.randn(2, 3, 8, 8), torch.randn(4, 9, 6)
    for module, inputs, width in ((conv, x, 27), (linear, y, 6)):
        one, same, other = (sample_inputs(module, inputs, 5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert one.shape == (5, width) and torch.equal(one, same) and not torch.equal(one, other)

    model = Model()

    def found(seed: int, names: list[str]) -> dict[str, Tensor]:
        modules: dict[str, nn.Linear | nn.Conv2d] = {name: model.called["linear"] for name in names}
        return activations(modules, [lambda x=x: model(x) for x in pictures()], 2, seed)

    both = found(0, ["a", "b"])
    assert torch.equal(both["a"], found(0, ["a"])["a"])  # whatever other layers there are
    assert not torch.equal(both["a"], both["b"]) and not torch.equal(both["a"], found(1, ["a"])["a"])


def test_each_call_draws_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are unit vectors, one drawn a call: ten calls on the same input see more than one of them."""
    monkeypatch.setattr(calibrate, "ROWS", 1)
    layer = nn.Linear(6, 2).requires_grad_(False)
    found = activations({"layer": layer}, [lambda: layer(torch.eye(6))] * 10, 6, 0)
    assert len(found["layer"]) > 2


def moment(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double() / len(rows)


def test_contrast_by_hand() -> None:
    """Wanted inputs lie along two axes, 3 and 1 long; the others only along the first: so the second axis comes first, and the one that
    none of them uses is not taken. The mean square of a wanted vector is 5, and a row by kaiming's would see a ninth of it."""
    wanted, others = torch.tensor([[3.0, 0, 0], [0, 1, 0]]), torch.tensor([[2.0, 0, 0]])
    rows = calibrate.contrast(wanted, others, 2)
    size = (5 / 9) ** 0.5
    torch.testing.assert_close(rows.abs(), torch.tensor([[0, size / 0.5**0.5, 0], [size / 4.5**0.5, 0, 0]]), atol=1e-5, rtol=0)


def test_contrast_is_the_generalised_eigenproblem_and_as_loud_as_kaiming() -> None:
    generator = torch.Generator().manual_seed(8)
    wanted, others = (torch.randn(50, 9, generator=generator) @ torch.randn(9, 9, generator=generator) for _ in range(2))
    rows = calibrate.contrast(wanted, others, 9).double()
    held = moment(others) + calibrate.RIDGE * moment(others).trace() / 9 * torch.eye(9)
    gains = torch.linalg.eigvals(torch.linalg.solve(held, moment(wanted))).real.sort(descending=True).values
    of_rows = (rows @ moment(wanted) * rows).sum(dim=1) / (rows @ held * rows).sum(dim=1)
    torch.testing.assert_close(of_rows, gains, rtol=1e-4, atol=0)
    torch.testing.assert_close((rows @ moment(wanted) * rows).sum(dim=1), (moment(wanted).trace() / 27).expand(9), rtol=1e-4, atol=0)


def test_contrasts_find_the_direction_that_only_the_batches_use() -> None:
    model = Model()
    torch.manual_seed(3)
    other = [torch.randn(2, 3, 9, 7) for _ in range(3)]
    mine = [x + torch.tensor([5.0, 0, 0])[:, None, None] for x in other]
    found = contrasts(model.called, [lambda x=x: model(x) for x in mine], [lambda x=x: model(x) for x in other], 4, 0)
    assert_untouched(model)
    assert found["conv"].shape == (4, 27) and found["linear"].shape == (4, 8)

    def share(rows: Tensor) -> float:
        """Of what the batches' inputs say to the rows, how much the others' say."""
        of_other, of_mine = (
            (F.unfold(torch.cat(x), 3, padding=1, stride=2).mT.reshape(-1, 27) @ rows.T).square().mean() for x in (other, mine)
        )
        return float(of_other / of_mine)

    assert share(found["conv"][:1]) < 0.05 < share(torch.randn(64, 27))
