"""Every norm sees the rows of a batch one after the other, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fap.nets.build import prepare
from fap.nets.dual import norm_state, norms, set_groups, undivided
from fap.nets.norm import DualNorm, Group

SIZE = 16


class Folded(nn.Module):
    """Patches whose tokens are folded into the first dimension by `fold`."""

    def __init__(
        self, norm: nn.Module, fold: Callable[[Tensor], Tensor], unfold: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = norm
        self.fc = nn.Linear(8, 5)
        self.fold = fold
        self.unfold = unfold

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)  # (B, 16, 8)
        x = self.unfold(self.norm(self.fold(x)))
        return self.fc(x.mean(1))


def row_after_row(norm: nn.Module) -> nn.Module:
    return Folded(norm, lambda x: x.flatten(0, 1), lambda x: x.unflatten(0, (-1, 16)))


def token_after_token(norm: nn.Module) -> nn.Module:
    def fold(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(0, 1)

    def unfold(x: Tensor) -> Tensor:
        return x.unflatten(0, (16, -1)).transpose(0, 1)

    return Folded(norm, fold, unfold)


def tokens_first(norm: nn.Module) -> nn.Module:
    """(N, B, C), as torch's attention has it by default."""
    return Folded(norm, lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1))


def windows_first(norm: nn.Module) -> nn.Module:
    """Windows of two tokens; those of one window of all images lie together."""

    def fold(x: Tensor) -> Tensor:
        return x.unflatten(1, (8, 2)).transpose(0, 1).flatten(0, 1)

    def unfold(x: Tensor) -> Tensor:
        return x.unflatten(0, (8, -1)).transpose(0, 1).flatten(1, 2)

    return Folded(norm, fold, unfold)


class OnEmbedding(nn.Module):
    """A norm of parameters, whose first dimension has nothing to do with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.embedding = nn.Parameter(torch.randn(16, 8))
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.norm(self.embedding)
        return self.fc(x.relu().mean(1))


WRONG = {
    "token after token": lambda: token_after_token(nn.LayerNorm(8)),
    "(N, B, C)": lambda: tokens_first(nn.LayerNorm(8)),
    "windows first": lambda: windows_first(nn.LayerNorm(8)),
    "batch norm, token after token": lambda: token_after_token(nn.BatchNorm1d(8)),
    "on an embedding": OnEmbedding,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_model_whose_rows_do_not_lie_together_is_refused(name: str) -> None:
    says = r"does not hand the rows of a batch one after the other to norm \((Layer|Batch)Norm"
    with pytest.raises(ValueError, match=says):
        prepare(WRONG[name](), size=SIZE)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.BatchNorm1d(8)], ids=lambda n: str(type(n)))
def test_folded_rows_that_lie_together_are_proved(norm: nn.Module) -> None:
    """And a group's rows are then all of its images' tokens: a forward equals separate ones."""
    model = prepare(row_after_row(norm), size=SIZE).double()
    assert norm_state(model).multiples
    (dual,) = norms(model)
    assert dual.aux is not None
    nn.init.uniform_(dual.aux.weight, 2, 3)  # type: ignore[arg-type]
    x = torch.randn(5, 3, SIZE, SIZE).double()
    set_groups(model.train(), [Group("main", 3), Group("aux", 2)])
    both = model(x)
    set_groups(model, [Group("main", 3)])
    main = model(x[:3])
    set_groups(model, [Group("aux", 2)])
    torch.testing.assert_close(both, torch.cat([main, model(x[3:])]))


def test_what_needs_no_proof_costs_none() -> None:
    """Images through BatchNorm2d alone, and norms that vanilla training does not divide."""
    images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AvgPool2d(14), nn.Flatten())
    calls: list[int] = []
    images.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    assert not norm_state(prepare(images, size=SIZE)).multiples
    tokens = tokens_first(nn.LayerNorm(8))
    tokens.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    model = prepare(tokens, aux=False, size=SIZE)
    assert len(calls) == 2, "only the stem's look at each model"
    set_groups(model.train(), [Group("main", 3), Group("main", 3)])
    assert model(torch.randn(6, 3, SIZE, SIZE)).shape == (6, 5)


def test_a_batch_norm_of_folded_images_is_proved() -> None:
    """By class it is one of images, but its first dimension is no batch."""

    class Tiles(nn.Module):
        def __init__(self, first: int) -> None:
            super().__init__()
            self.first = first
            self.stem = nn.Conv2d(3, 8, 4, stride=4)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            tiles = self.stem(x).unflatten(2, (2, 2)).movedim(2, self.first)
            shape = tiles.shape[:2]
            tiles = self.norm(tiles.flatten(0, 1)).unflatten(0, shape)
            return tiles.movedim(self.first, 1).mean((1, 3, 4))

    assert norm_state(prepare(Tiles(1), size=SIZE)).multiples
    with pytest.raises(ValueError, match=r"one after the other to norm \(BatchNorm2d\)"):
        prepare(Tiles(0), size=SIZE)


def test_vanilla_training_takes_such_a_batch_norm_as_one_group() -> None:
    model = prepare(WRONG["batch norm, token after token"](), aux=False, size=SIZE, any_norm=True)
    (dual,) = norms(model)
    assert isinstance(dual, DualNorm)
    assert dual.whole_batch
    assert undivided(model) == ["BatchNorm1d"]
    plain = WRONG["batch norm, token after token"]()
    plain.load_state_dict(model.state_dict())
    set_groups(model.train(), [Group("main", 2, 0, 2), Group("main", 2, 1, 2)])
    x = torch.randn(4, 3, SIZE, SIZE)
    torch.testing.assert_close(model(x), plain.train()(x))
    torch.testing.assert_close(model.norm.running_var, plain.norm.running_var)  # type: ignore[union-attr]


def test_the_proof_leaves_no_trace() -> None:
    model = row_after_row(nn.BatchNorm1d(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    prepare(model, size=SIZE)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert model.training
    assert model.norm.training  # type: ignore[union-attr]
    after = model.state_dict()
    assert all(torch.equal(after[name.replace(".aux.", ".")], v) for name, v in before.items())


def test_an_untrained_network_that_overflows_is_no_mistake() -> None:
    model = row_after_row(nn.LayerNorm(8))
    model.stem.weight.data.mul_(1e38)  # type: ignore[union-attr,operator]
    prepare(model, size=SIZE)
