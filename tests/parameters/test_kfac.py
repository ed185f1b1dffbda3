"""Kronecker factors against products built by loops from single samples, and against the exact
matrix where theory says that they are it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support import parameters_zoo
from torch import nn

from fisherfast import parameters as P

CLASSES = 3
SAMPLES = 5

# Relative to the largest entry. Measured against the loops: at most 4e-16 and 2e-7.
EXACT = 1e-12
FLOAT32 = 1e-5


class Means(nn.Module):
    """Means over the positions of [n, T, C], or over all but the channels of [n, C, ...]."""

    def forward(self, x):
        return x.mean(1) if x.dim() == 3 else x.flatten(2).mean(2)


class LastMeans(nn.Module):
    """Means over the positions of [n, C, L]."""

    def forward(self, x):
        return x.mean(2)


def conv(**settings):
    return nn.Sequential(nn.Conv2d(4, 4, 3, **settings), nn.Tanh(), Means(), nn.Linear(4, CLASSES))


NETWORKS = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)),
        (4,),
    ),
    "no bias": (
        lambda: nn.Sequential(
            nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, CLASSES, bias=False)
        ),
        (4,),
    ),
    "shared linear": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Means(), nn.Linear(5, CLASSES)),
        (6, 4),
    ),
    "strided": (lambda: conv(stride=(2, 1), padding=(1, 0)), (4, 6, 5)),
    "grouped": (lambda: conv(groups=2), (4, 5, 5)),
    "depthwise, no bias": (lambda: conv(groups=4, bias=False), (4, 5, 5)),
    "dilated": (lambda: conv(dilation=(1, 2), padding=1), (4, 5, 6)),
    "reflected": (lambda: conv(padding=1, padding_mode="reflect"), (4, 5, 6)),
    "1d": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 4, 3, padding="same"), nn.Tanh(), LastMeans(), nn.Linear(4, CLASSES)
        ),
        (4, 7),
    ),
    "same": (lambda: conv(padding="same", dilation=(1, 3)), (4, 4, 7)),
    "one sided": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 4, 4, padding="same"), nn.Tanh(), LastMeans(), nn.Linear(4, CLASSES)
        ),
        (4, 6),
    ),
    "3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.Tanh(), Means(), nn.Linear(4, CLASSES)),
        (2, 3, 3, 4),
    ),
}


def network(name, dtype=torch.float64):
    torch.manual_seed(3)
    make, shape = NETWORKS[name]
    return make().to(dtype), torch.randn(SAMPLES, *shape, dtype=torch.float64).to(dtype)


# --- the oracle: single samples, single positions, Python loops ----------------------------------


def seen_by(model, x):
    """(input, output) of each layer with weights for one sample alone, with the outputs' graph."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if hasattr(module, "weight"):
            handles.append(
                module.register_forward_hook(
                    lambda m, i, o, name=name: seen.__setitem__(name, (m, i[0].detach(), o))
                )
            )
    f = model(x[None])[0]
    for handle in handles:
        handle.remove()
    return f, seen


def rows_of(module, x, g):
    """(a, b) of every position and group: a[group][position] and b[group][position]."""
    if isinstance(module, nn.Linear):
        return [list(x.reshape(-1, x.shape[-1]))], [list(g.reshape(-1, g.shape[-1]))]
    around = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x, g = F.pad(x, around, mode=mode)[0], g[0]
    groups = module.groups
    a, b = [[] for _ in range(groups)], [[] for _ in range(groups)]
    for place in itertools.product(*(range(size) for size in g.shape[1:])):
        patch = x
        for axis, at in enumerate(place):
            start = at * module.stride[axis]
            taps = [start + k * module.dilation[axis] for k in range(module.kernel_size[axis])]
            patch = patch.index_select(1 + axis, torch.tensor(taps))
        there = g[(slice(None), *place)]
        for group in range(groups):
            a[group].append(patch.chunk(groups)[group].flatten())
            b[group].append(there.chunk(groups)[group])
    return a, b


def columns_of(f):
    """The root of diag(p) - p p^T, class by class: sqrt(p_c) (e_c - p)."""
    p = f.detach().softmax(0)
    return [p[c].sqrt() * (F.one_hot(torch.tensor(c), len(p)).to(p) - p) for c in range(len(p))]


def kronecker_by_loops(model, inputs, sharing):
    """The whole matrix [P, P] as the paper writes it."""
    model, inputs = model.double(), inputs.double()
    names = [name for name, _ in model.named_parameters()]
    ends = torch.tensor([0] + [p.numel() for p in model.parameters()]).cumsum(0).tolist()
    start = dict(zip(names, ends[:-1], strict=True))
    factors = {}
    for x in inputs:
        f, seen = seen_by(model, x)
        for number, column in enumerate(columns_of(f)):
            outputs = [out for _, _, out in seen.values()]
            gradients = torch.autograd.grad(f, outputs, column, retain_graph=True)
            for (name, (module, given, _)), g in zip(seen.items(), gradients, strict=True):
                a, b = rows_of(module, given, g)
                for group in range(len(a)):
                    T = len(a[group])
                    if module.bias is not None:
                        a[group] = [torch.cat([row, torch.ones(1).double()]) for row in a[group]]
                    A, B = factors.setdefault((name, group), [0, 0])
                    if sharing == "expand":
                        B = B + sum(torch.outer(row, row) for row in b[group])
                        new = sum(torch.outer(row, row) for row in a[group]) / T
                    else:
                        whole, mean = sum(b[group]), sum(a[group]) / T
                        B = B + torch.outer(whole, whole)
                        new = torch.outer(mean, mean)
                    factors[name, group] = [A + new if number == 0 else A, B]
    dense = torch.zeros(ends[-1], ends[-1], dtype=torch.float64)
    modules = dict(model.named_modules())
    for (name, group), (A, B) in factors.items():
        weight = modules[name].weight
        M, D = len(B), weight[0].numel()
        first = start[f"{name}.weight"] + group * M * D
        where = []
        for m in range(M):
            where += [first + m * D + d for d in range(D)]
            if len(A) > D:
                where.append(start[f"{name}.bias"] + group * M + m)
        where = torch.tensor(where)
        dense[where[:, None], where] = torch.kron(B, A) / len(inputs) ** 2
    return dense


def assert_near(got, truth, tolerance=EXACT):
    assert got.dtype == torch.float64
    assert got.shape == truth.shape
    assert ((got - truth).abs() <= tolerance * truth.abs().max()).all()


def exact_matrix(model, inputs, scale):
    """J^T J / n over samples and outputs, each gradient by itself; scale: of every output."""
    rows = []
    for x in inputs:
        for output in model(x[None]).flatten():
            parts = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
            rows.append(scale * torch.cat([part.flatten() for part in parts]))
    J = torch.stack(rows)
    return J.T @ J / len(inputs)


def only_blocks(matrix, model):
    """The matrix without the terms between layers."""
    layer = [
        name.rpartition(".")[0] for name, p in model.named_parameters() for _ in range(p.numel())
    ]
    same = torch.tensor([[a == b for a in layer] for b in layer])
    return matrix * same


# --- the factors ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_products_built_by_loops(name, sharing):
    """Catches a wrong scale of positions or samples, a bias apart from its weights, patches in
    another order than the weights, groups mixed, and padding or dilation ignored."""
    model, x = network(name)
    got = P.fisher(model, P.Categorical(), x, structure="kfac", sharing=sharing)
    assert got.diagonal_names == ()
    assert_near(got.to_dense(), kronecker_by_loops(model, x, sharing))


@pytest.mark.parametrize("name", ["shared linear", "grouped", "strided"])
def test_float32(name):
    """Catches sums in float32 over a whole batch."""
    model, x = network(name, torch.float32)
    got = P.fisher(model, P.Categorical(), x, structure="kfac").to_dense()
    assert_near(got, kronecker_by_loops(model, x, "expand"), FLOAT32)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["shared linear", "grouped"])
def test_batch_size_does_not_matter(name, sharing):
    """Catches products of factors summed over batches, and means of batches of unequal size."""
    model, x = network(name)
    whole = P.fisher(model, P.Categorical(), x, structure="kfac", sharing=sharing)
    for size in (1, 2):
        got = P.fisher(
            model, P.Categorical(), x, structure="kfac", sharing=sharing, batch_size=size
        )
        assert_near(got.to_dense(), whole.to_dense())


def test_portions_of_a_batch_add_up(monkeypatch):
    """Catches patches of only the first portion, where they do not fit into memory at once."""
    model, x = network("strided")
    whole = P.fisher(model, P.Categorical(), x, structure="kfac").to_dense()
    monkeypatch.setattr("fisherfast.parameters.layers.linear.PORTION_BYTES", 1)
    assert_near(P.fisher(model, P.Categorical(), x, structure="kfac").to_dense(), whole)


@pytest.mark.parametrize("chosen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["linear", "grouped", "shared linear"])
def test_weights_or_biases_alone(name, chosen):
    """Catches a 1 among the inputs without a bias, and a bias that is measured without weights."""
    model, x = network(name)
    kept = torch.cat(
        [torch.full((p.numel(),), chosen in key) for key, p in model.named_parameters()]
    )
    truth = kronecker_by_loops(model, x, "expand")[kept][:, kept]
    got = P.fisher(model, P.Categorical(), x, structure="kfac", parameters=chosen)
    assert_near(got.to_dense(), truth)


@pytest.mark.parametrize(("fisher_type", "samples"), [("mc", 3), ("empirical", 1)])
def test_other_types_have_the_same_inputs(fisher_type, samples):
    """The factor of the inputs does not depend on labels: catches one that is summed once for each
    column of the root instead of once."""
    model, x = network("shared linear")
    y = torch.arange(SAMPLES) % CLASSES
    exact = P.fisher(model, P.Categorical(), (x, y), structure="kfac")
    other = P.fisher(
        model, P.Categorical(), (x, y), structure="kfac", fisher_type=fisher_type, samples=samples
    )
    for left, right in zip(exact.blocks, other.blocks, strict=True):
        assert_near(left.inputs, right.inputs)
        assert not torch.equal(left.gradients, right.gradients)


# --- where it is the exact matrix ----------------------------------------------------------------


def test_one_sample_without_shared_positions_is_exact():
    """Catches a factor that is not of the whole root of the output Fisher."""
    model, x = network("linear")
    got = P.fisher(model, P.Gaussian(0.25), x[:1], structure="kfac")
    assert_near(got.to_dense(), only_blocks(exact_matrix(model, x[:1], 2.0), model))


def deep_linear(*after):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), *after).double()


def test_deep_linear_networks_are_exact():
    """Martens 2020, section 8; with several positions Eschenhagen et al. 2023, section 3: "expand"
    for outputs at each position, "reduce" for their mean. Catches the two exchanged, and a factor
    of T in either."""
    torch.manual_seed(6)
    flat, rows = torch.randn(7, 4).double(), torch.randn(7, 6, 4).double()
    for model, x, sharing in (
        (deep_linear(), flat, "expand"),
        (deep_linear(), flat, "reduce"),
        (deep_linear(), rows, "expand"),
        (deep_linear(Means()), rows, "reduce"),
    ):
        got = P.fisher(model, P.Gaussian(4.0), x, structure="kfac", sharing=sharing)
        assert_near(got.to_dense(), only_blocks(exact_matrix(model, x, 0.5), model))


def test_a_linear_convolution_with_pooling_is_exact():
    """Catches patches whose mean is taken over the wrong positions."""
    torch.manual_seed(6)
    x = torch.randn(4, 2, 5, 6).double()
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), Means()).double()
    got = P.fisher(model, P.Gaussian(), x, structure="kfac", sharing="reduce")
    assert_near(got.to_dense(), only_blocks(exact_matrix(model, x, 1.0), model))


def test_trace_by_factors():
    """tr(B (x) A) = tr A tr B, in each group: catches a trace of the two factors' sum."""
    model, x = network("depthwise, no bias")
    got = P.fisher(model, P.Categorical(), x, structure="kfac")
    by_factors = sum(
        block.inputs.diagonal(dim1=1, dim2=2).sum(1)
        @ block.gradients.diagonal(dim1=1, dim2=2).sum(1)
        for block in got.blocks
    )
    assert got.trace() == pytest.approx(float(by_factors), rel=EXACT)


# --- what it can be asked ------------------------------------------------------------------------

ASKED = ["linear", "shared linear", "grouped"]


@pytest.mark.parametrize("name", ASKED)
def test_algebra_is_that_of_the_dense_matrix(name):
    """Catches damping that is put on the factors instead of the product, eigenvalues of one factor
    alone, and weight and bias written back to each other's place."""
    model, x = network(name)
    got = P.fisher(model, P.Categorical(), x, structure="kfac")
    dense, damping = got.to_dense(), 0.01
    damped = dense + damping * torch.eye(len(dense)).double()
    v = torch.randn(len(dense), 2, generator=torch.Generator().manual_seed(1)).double()
    assert_near(got @ v, dense @ v)
    assert_near(got.solve(v, damping=damping), torch.linalg.solve(damped, v), 1e-10)
    assert_near(got.diag(), dense.diagonal())
    assert got.trace() == pytest.approx(float(dense.trace()), rel=EXACT)
    assert got.logdet(damping=damping) == pytest.approx(float(damped.logdet()), rel=1e-10)
    assert_near(got.eigenvalues(), torch.linalg.eigvalsh(dense))
    assert got.eigenvalues().shape == (got.shape[0],)
    assert (got.eigenvalues().diff() >= 0).all()


def test_singular_without_damping():
    """The classes' probabilities add to one, so that B is singular: catches an inverse of rounding
    errors, and a finite log-determinant."""
    model, x = network("linear")
    got = P.fisher(model, P.Categorical(), x, structure="kfac")
    assert got.logdet() == -float("inf")
    with pytest.raises(ValueError, match="damping must be positive, got 0: some directions"):
        got.solve(torch.ones(got.shape[0]))
    with pytest.raises(ValueError, match="damping must be finite and at least 0, got -1"):
        got.logdet(damping=-1)


def test_regular_without_damping():
    """Catches a refusal of every matrix."""
    torch.manual_seed(0)
    x = torch.randn(9, 4).double()
    got = P.fisher(nn.Linear(4, 2).double(), P.Gaussian(), x, structure="kfac")
    v = torch.ones(10).double()
    assert_near(got @ got.solve(v), v, 1e-10)


@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_state_round_trip(name, tmp_path):
    """Catches a state without the places of the blocks, the sharing, or the diagonal."""
    model, x = network(name)
    model = nn.Sequential(*model, nn.LayerNorm(CLASSES).double())
    got = P.fisher(model, P.Categorical(), x, structure="kfac", sharing="reduce")
    torch.save(got.state_dict(), tmp_path / "kfac.pt")
    again = P.from_state_dict(torch.load(tmp_path / "kfac.pt", weights_only=True))
    assert torch.equal(again.to_dense(), got.to_dense())
    assert (repr(again), again.sharing) == (repr(got), "reduce")


# --- what has no Kronecker form ------------------------------------------------------------------


def test_other_layers_have_their_exact_diagonal():
    """Catches norms that are left out, and a repr that does not say that they are diagonal."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), Means(), nn.Linear(4, CLASSES))
    tokens = torch.randint(7, (SAMPLES, 6))
    model = model.double()
    got = P.fisher(model, P.Categorical(), tokens, structure="kfac")
    assert got.diagonal_names == ("0.weight", "1.weight", "1.bias")
    assert repr(got).endswith("5 samples; diagonal alone: 0.weight, 1.weight, 1.bias>")
    diagonal = P.fisher(model, P.Categorical(), tokens, structure="diag").diag()
    where = torch.arange(7 * 4 + 8)
    assert_near(got.diag()[where], diagonal[where])
    rest = got.to_dense() - torch.diag(got.diag())
    assert rest[where].eq(0).all()
    assert rest[:, where].eq(0).all()
    v = torch.ones(got.shape[0]).double()
    assert_near(got.solve(v, damping=0.1)[where], 1 / (diagonal[where] + 0.1))


REFUSED = (
    "called twice",
    "tied head",
    "transformer, time first",
    "weights in an expression",
    "windows mixed",
)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", parameters_zoo.NETWORKS)
def test_every_network_is_measured_or_refused(name):
    """Catches a layer whose factors are of another shape than its parameters, a parameter that no
    part answers for, a diagonal that is not exact, and a network that is refused without need."""
    network = parameters_zoo.NETWORKS[name]
    model, x = network.make(), network.inputs()
    if name in REFUSED:
        with pytest.raises(ValueError, match="parameters must be used by one call of one layer"):
            P.fisher(model, P.Categorical(), x, structure="kfac")
        return
    exact = P.fisher(model, P.Categorical(), x, structure="diag").diag()
    for sharing in ("expand", "reduce"):
        got = P.fisher(model, P.Categorical(), x, structure="kfac", sharing=sharing)
        places = got.layout.slices()
        covered = torch.zeros(got.shape[0])
        for block in got.blocks:
            for place in (block.weight, block.bias):
                if place is not None:
                    covered[slice(*place)] += 1
        for own in got.diagonal_names:
            covered[places[own]] += 1
            assert_near(got.diag()[places[own]], exact[places[own]])
        assert covered.eq(1).all()
        assert got.eigenvalues().min() >= 0


class Twice(nn.Module):
    """One linear layer called twice."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.inner(torch.tanh(self.inner(x))))


class TiedHead(nn.Module):
    """An embedding whose table is the last layer's weights too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.table(x).mean(1))


@pytest.mark.parametrize(
    ("model", "x", "name"),
    [
        (Twice(), torch.ones(3, 4), "inner.weight"),
        (TiedHead(), torch.ones(3, 2, dtype=torch.long), "table.weight"),
    ],
)
def test_tied_weights_are_refused(model, x, name):
    """Catches the sum of two Kronecker products given as one, and a diagonal that is not said."""
    with pytest.raises(ValueError, match=f"for \"kfac\", got '{name}', which is shared") as caught:
        P.fisher(model, P.Categorical(), x, structure="kfac")
    assert "parameters=" in str(caught.value)


def test_the_rest_of_a_network_with_tied_weights():
    """The way out that the error names."""
    torch.manual_seed(2)
    got = P.fisher(Twice(), P.Categorical(), torch.randn(3, 4), structure="kfac", parameters="head")
    assert got.layout.names == ("head.weight", "head.bias")
    assert got.trace() > 0


def test_unknown_sharing():
    model, x = network("linear")
    with pytest.raises(ValueError, match="sharing must be one of 'expand', 'reduce', got 'both'"):
        P.fisher(model, P.Categorical(), x, structure="kfac", sharing="both")
