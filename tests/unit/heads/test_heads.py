"""The sharded margin softmax equals the plain one; margins, centres and class ranges by hand."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.heads.centres import initial_centres
from dist_train.heads.class_parallel import ClassMeans, MarginHead, arcface, cosface, margin_shares
from shards.storage.errors import BadInput

LOSSES = ("arcface", "cosface")


def plain_loss(embeddings, weight, labels, loss: str, scale: float, margin: float):
    """The B x C softmax of the papers, by autograd."""
    cosine = F.normalize(embeddings, dim=1) @ F.normalize(weight, dim=1).T
    rows = torch.arange(len(labels))
    own = cosine[rows, labels]
    if loss == "cosface":
        moved = own - margin
    else:
        theta = torch.acos(own.clamp(-1 + 1e-7, 1 - 1e-7))
        moved = torch.where(
            theta < math.pi - margin, torch.cos(theta + margin), own - margin * math.sin(margin)
        )
    shift = torch.zeros_like(cosine).index_put((rows, labels), moved - own)
    return F.cross_entropy(scale * (cosine + shift), labels)


def ours(head: MarginHead, embeddings, labels, margin: float):
    """Loss, gradient of the embeddings, gradient of the centres."""
    at = embeddings.clone().requires_grad_()
    head.weight.grad = None
    value = head(at, labels, margin)
    value.backward()
    return value.detach(), at.grad, head.weight.grad.clone()


def plain(head: MarginHead, embeddings, labels, loss: str, margin: float):
    at = embeddings.clone().requires_grad_()
    weight = head.weight.detach().clone().requires_grad_()
    value = plain_loss(at, weight, labels, loss, head.scale, margin)
    value.backward()
    return value.detach(), at.grad, weight.grad


def make_head(
    loss: str, C: int, D: int, scale: float, chunk: int, seed: int = 0, **options
) -> MarginHead:
    return MarginHead(classes=C, width=D, loss=loss, scale=scale, chunk=chunk, seed=seed, **options)


@st.composite
def problems(draw):
    C, D, B = draw(st.integers(2, 70)), draw(st.integers(3, 24)), draw(st.integers(1, 24))
    # One chunk, one class a chunk, chunks that do not divide C.
    chunk = draw(st.one_of(st.just(1), st.integers(2, 9), st.just(C), st.just(10 * C)))
    head = make_head(
        draw(st.sampled_from(LOSSES)), C, D, draw(st.floats(1, 64)), chunk, draw(st.integers(0, 99))
    )
    torch.manual_seed(draw(st.integers(0, 10_000)))
    few = draw(st.integers(1, C))  # few classes: the same label many times in a batch
    labels = torch.randint(0, few, (B,))
    return head.double(), torch.randn(B, D).double() * 3, labels, draw(st.floats(0, 0.9))


@settings(max_examples=80, deadline=None)
@given(problems())
def test_float64_loss_and_gradients_equal_the_plain_softmax(problem):
    head, embeddings, labels, margin = problem
    loss = "arcface" if head.margin_of is arcface else "cosface"
    truth = plain(head, embeddings, labels, loss, margin)
    for mine, theirs in zip(ours(head, embeddings, labels, margin), truth, strict=True):
        bound = 1e-10 * max(1.0, theirs.abs().max().item())
        assert (mine - theirs).abs().max().item() <= bound


def test_chunks_change_nothing_but_rounding():
    torch.manual_seed(3)
    embeddings, labels = torch.randn(12, 8).double(), torch.randint(0, 37, (12,))
    answers = [
        ours(make_head("arcface", 37, 8, 64.0, chunk).double(), embeddings, labels, 0.5)
        for chunk in (1, 5, 36, 37, 1000)
    ]
    for answer in answers[1:]:
        for mine, theirs in zip(answer, answers[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_the_gradient_follows_the_loss_that_is_made_of_it():
    torch.manual_seed(4)
    head = make_head("arcface", 9, 6, 30.0, 4).double()
    embeddings, labels = torch.randn(5, 6).double(), torch.randint(0, 9, (5,))
    _, d_embeddings, d_weight = ours(head, embeddings, labels, 0.3)
    at = embeddings.clone().requires_grad_()
    head.weight.grad = None
    (head(at, labels, 0.3) * 2.5 + at.sum()).backward()
    torch.testing.assert_close(at.grad, 2.5 * d_embeddings + 1)
    torch.testing.assert_close(head.weight.grad, 2.5 * d_weight)


@pytest.mark.parametrize("scale", [16.0, 64.0])
@pytest.mark.parametrize(
    ("near", "margin"), [(0.0, 0.0), (0.0, 0.9), (0.5, 0.0), (0.5, 0.5), (0.7, 0.5), (0.9, 0.5)]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_float32_is_about_as_exact_as_the_plain_softmax(loss, near, margin, scale):
    """`near` 0: embeddings anywhere; towards 1: at their own centres, as late in a training."""
    mine, theirs, sizes = ([0.0] * 3 for _ in range(3))
    for seed in range(24):
        head = make_head(loss, 300, 32, scale, 77, seed)
        torch.manual_seed(seed)
        labels = torch.randint(0, 300, (48,))
        towards = F.normalize(head.weight.detach()[labels], dim=1)
        embeddings = near * towards + (1 - near) * F.normalize(torch.randn(48, 32), dim=1)
        got = ours(head, embeddings, labels, margin)
        same = plain(head, embeddings, labels, loss, margin)
        truth = plain(head.double(), embeddings.double(), labels, loss, margin)
        for kind in range(3):
            mine[kind] += (got[kind].double() - truth[kind]).norm().item()
            theirs[kind] += (same[kind].double() - truth[kind]).norm().item()
            sizes[kind] += truth[kind].norm().item()
    for kind, name in enumerate(("loss", "embeddings", "centres")):
        assert mine[kind] <= 2 * theirs[kind] + 1.2e-7 * sizes[kind], name


def adversarial(head: MarginHead, B: int = 10_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, D) along, against, at their own centre, and zero, of any length; labels."""
    labels = torch.randint(0, head.classes, (B,))
    own = head.weight.detach()[labels * head.centres]
    size = torch.logspace(-30, 30, B).unsqueeze(1)
    choices = torch.stack([own * size, -own * size, torch.zeros_like(own), own, F.normalize(own)])
    return choices[torch.arange(B) % len(choices), torch.arange(B)], labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("centres", [1, 3])
def test_gradients_are_finite_for_adversarial_embeddings(loss, margin, dtype, centres):
    torch.manual_seed(0)
    head = make_head(loss, 50, 16, 64.0, 7, centres=centres)
    embeddings, labels = adversarial(head)
    value, d_embeddings, d_weight = ours(head, embeddings.to(dtype), labels, margin)
    assert d_embeddings.dtype == dtype
    assert torch.isfinite(value)
    assert torch.isfinite(d_embeddings).all()
    assert torch.isfinite(d_weight).all()


def test_a_vector_without_direction_has_no_gradient_and_moves_nothing():
    head = make_head("arcface", 9, 4, 32.0, 5)
    embeddings = torch.randn(3, 4)
    embeddings[1] = 0
    _, d_embeddings, _ = ours(head, embeddings, torch.tensor([1, 2, 3]), 0.3)
    assert not d_embeddings[1].any()
    assert d_embeddings[[0, 2]].any(1).all()
    with torch.no_grad():
        head.weight[4] = 0
    assert not ours(head, embeddings, torch.tensor([4, 2, 4]), 0.3)[2][4].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["embeddings", "centres"])
def test_what_is_no_number_is_not_hidden(bad, which):
    head, embeddings = make_head("arcface", 9, 4, 32.0, 5), torch.randn(3, 4)
    if which == "embeddings":
        embeddings[1, 2] = bad
    else:
        head.weight.data[5, 0] = bad
    assert not torch.isfinite(head(embeddings, torch.tensor([1, 2, 3]), 0.3))


@pytest.mark.parametrize("bad", [-1, 9])
def test_a_class_that_the_head_lacks_is_named_with_its_row(bad):
    head = make_head("arcface", 9, 4, 32.0, 5)
    with pytest.raises(BadInput, match=f"row 1 of the global batch: class {bad}, there are 9"):
        head(torch.randn(3, 4), torch.tensor([8, bad, 0]), 0.3)


def partial_fc(cosine: torch.Tensor, labels: torch.Tensor, scale: float, margin: float):
    """Logits of arcface_torch (losses.py), the target's rewritten in place without gradient."""
    rows = torch.arange(len(labels))
    cosine = cosine.clone()
    with torch.no_grad():
        own = cosine[rows, labels]
        sine = (1 - own.square()).sqrt()
        cosine[rows, labels] = own * math.cos(margin) - sine * math.sin(margin)
    return cosine * scale


def test_detached_is_partial_fc_and_the_true_gradient_is_another():
    torch.manual_seed(2)
    embeddings, labels = torch.randn(24, 16), torch.randint(0, 40, (24,))
    detached = make_head("arcface", 40, 16, 64.0, 7, detached=True)
    mine = ours(detached, embeddings, labels, 0.5)
    at, weight = embeddings.clone().requires_grad_(), detached.weight.detach().requires_grad_()
    cosine = F.linear(F.normalize(at), F.normalize(weight))
    value = F.cross_entropy(partial_fc(cosine, labels, 64.0, 0.5), labels)
    value.backward()
    for one, two in zip(mine, (value.detach(), at.grad, weight.grad), strict=True):
        assert (one - two).abs().max() <= 2e-6 * two.abs().max()
    true = ours(make_head("arcface", 40, 16, 64.0, 7), embeddings, labels, 0.5)
    assert true[0] == mine[0]
    assert (true[1] - mine[1]).abs().max() > 0.05 * true[1].abs().max()


def test_rare_classes_get_more_of_the_margin():
    sizes = torch.tensor([1, 2, 16, 81, 256, 256])
    shares = margin_shares(sizes, 0.1)
    # n^-1/4 of 1, 16, 81 and 256: 1, 1/2, 1/3, 1/4
    wanted = [1, 0.1 + 0.9 * (1 / 2 - 1 / 4) / (3 / 4), 0.1 + 0.9 * (1 / 3 - 1 / 4) / (3 / 4)]
    assert shares[[0, 2, 3]].tolist() == pytest.approx(wanted)
    assert shares[[4, 5]].tolist() == pytest.approx([0.1, 0.1])
    assert (shares.diff() <= 0).all()
    assert margin_shares(torch.tensor([3, 3]), 0.1).tolist() == [1, 1]


def test_weights_of_half_precision_embeddings_get_float32_gradients():
    head = make_head("arcface", 20, 8, 64.0, 6)
    torch.manual_seed(1)
    vectors = torch.randn(6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(vectors, torch.arange(6), 0.5)
    assert inside.dtype == torch.float32
    assert inside.item() == head(vectors, torch.arange(6), 0.5).item()


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5, 0.9, math.pi / 2])
def test_arcface_falls_with_the_angle_all_the_way(margin):
    theta = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    value = arcface(theta.cos(), margin)
    assert (value.diff() <= 1e-12).all()
    assert value[0] - value[-1] >= 2 - 1e-2 - margin


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5, 0.9])
def test_arcface_is_the_turned_angle_below_pi_minus_the_margin(margin):
    theta = torch.linspace(0, math.pi - margin, 20_001, dtype=torch.float64)[:-1]
    wrong = (arcface(theta.cos(), margin) - (theta + margin).cos()).abs()
    assert wrong.max() <= 1e-3  # the pole itself is rounded off, so that the slope stays finite
    assert wrong[(theta > 2e-3) & (theta < math.pi - 2e-3)].max() <= 1e-10


def test_cosface_moves_the_cosine():
    cosine = torch.linspace(-1, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(cosface(cosine, 0.35), cosine - 0.35)


@pytest.mark.parametrize("function", [arcface, cosface])
@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5, 0.9])
def test_slopes_equal_finite_differences(function, margin):
    step = 1e-6
    cosine = torch.linspace(-0.999, 0.999, 999, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(function(cosine, margin).sum(), cosine)
    at = cosine.detach()
    by_hand = (function(at + step, margin) - function(at - step, margin)) / (2 * step)
    smooth = (at + math.cos(margin)).abs() > 2 * step  # the corner where the line begins
    torch.testing.assert_close(slope[smooth], by_hand[smooth], rtol=1e-6, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_initial_centres_do_not_depend_on_the_cut(data):
    C, seed = data.draw(st.integers(1, 1200)), data.draw(st.integers(0, 2**31 - 1))
    cuts = sorted({0, C, *data.draw(st.lists(st.integers(0, C), max_size=5))})
    parts = [initial_centres(a, b, 5, seed) for a, b in itertools.pairwise(cuts)]
    whole = initial_centres(0, C, 5, seed)
    assert whole.shape == (C, 5)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(initial_centres(0, C + 300, 5, seed)[:C], whole)
    assert len(torch.unique(whole, dim=0)) == C


def test_initial_centres_differ_by_seed_and_may_be_none():
    assert not torch.equal(initial_centres(0, 4, 3, 0), initial_centres(0, 4, 3, 1))
    for nothing in (0, 7, 256):
        assert initial_centres(nothing, nothing, 3, 0).shape == (0, 3)


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(1, 40))
def test_class_ranges_cover_in_order_and_balanced(classes, world):
    heads = [make_head("arcface", classes, 1, 8, 3, rank=r, world=world) for r in range(world)]
    ranges = [(head.first, head.last) for head in heads]
    assert [c for first, last in ranges for c in range(first, last)] == list(range(classes))
    sizes = [last - first for first, last in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_a_rank_without_classes_makes_an_empty_head():
    parts = [
        MarginHead(classes=2, width=4, loss="arcface", scale=8, chunk=3, seed=0, rank=r, world=3)
        for r in range(3)
    ]
    assert [len(part.weight) for part in parts] == [1, 1, 0]
    whole = make_head("arcface", 2, 4, 8, 3)
    assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight)


def test_random_centres_are_those_that_earlier_versions_drew():
    """A run that grows from one of an earlier version finds its old classes where they were.

    The values are those of torch's CPU generator (MT19937, Box-Muller) as of torch 2.10.
    """
    (centre,) = initial_centres(300, 301, 4, 7)
    assert centre.tolist() == pytest.approx(
        [-0.0247251, 0.0089828, 0.0607256, -0.0715921], abs=1e-6
    )
    many = initial_centres(0, 20_000, 8, 3)
    assert many.mean().abs() < 1e-3
    assert many.std() == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("each", [1, 2, 3])
def test_sub_centres_begin_around_the_class_mean_but_apart(each):
    vectors = torch.eye(2, 32)
    head = make_head("arcface", 3, 32, 8, 3, seed=1, centres=each)
    means, weight = ClassMeans(head), head.weight.detach()
    means.add(vectors, torch.tensor([0, 2]))
    random = weight.clone()
    assert means.write() == 2
    by_class = weight.view(3, each, 32)
    for label, mean in ((0, vectors[0]), (2, vectors[1])):
        assert (torch.nn.functional.cosine_similarity(by_class[label], mean[None]) > 0.9).all()
        assert len(by_class[label].unique(dim=0)) == each
    assert torch.equal(by_class[1], random.view(3, each, 32)[1])  # a class without an item
