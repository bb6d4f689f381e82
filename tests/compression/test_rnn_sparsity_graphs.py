"""rnn-sparsity: random-graph networks, checks 4-6, the table of a sweep (8 and 9 small), and the strings."""

from __future__ import annotations

import csv
import warnings

import networkx as nx
import numpy as np
import pytest
import torch

from effdl import SparseGraphRNN, SparseGraphRNNModule
from effdl.compression.rnn_sparsity import recurrent_weights
from effdl.compression.rnn_sparsity_graphs import as_dag, graph_properties, layer_index, layers_of, random_graph
from effdl.compression.rnn_sparsity_models import last_state
from effdl.compression.rnn_sparsity_sweep import OUTCOMES, GraphSweep, correlations, predictability, write_table
from effdl.core.errors import ConfigurationError
from effdl.data.reber import MAX_LENGTH, MIN_LENGTH, ReberData, encode, is_reber, reber
from tests.support import golden

GOLDEN = golden("rnn-sparsity")
TRAINED = [case for case in GOLDEN["graphs"] if "weights" in case]
EXAMPLE = [(0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4)]


@pytest.mark.parametrize("case", GOLDEN["graphs"], ids=lambda c: f"{c['kind']}-{c['n']}")
def test_must_04_golden_layers_and_properties(case):
    index = layer_index(as_dag(case["edges"]))
    assert [index[node] for node in range(case["n"])] == case["layer_index"]
    assert layers_of(as_dag(case["edges"])) == [sorted(layer) for layer in case["layers"]]
    properties = graph_properties(case["edges"])
    errors = {name: abs(properties[name] - value) for name, value in case["properties"].items()}
    print(f"golden, properties: {max(errors.values()):.1e}")
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize("layout", ["repeat", "tile"])
@pytest.mark.parametrize("case", TRAINED, ids=lambda c: c["mode"])
def test_must_04_golden_outputs(case, layout):
    options = {"gate_layout": layout, "batch_first": False, "layers": case["layers"]}
    rnn = SparseGraphRNN(case["edges"], case["mode"], **options)
    rnn.load_state_dict({name: torch.tensor(value) for name, value in case["weights"].items()}, strict=True)
    assert [{"target_layer": a, "source_layer": b} for a, b in rnn.skips] == case["skip"]
    error = (rnn(torch.tensor(case["x"]))[-1] - torch.tensor(case["output"])).abs().max().item()
    print(f"golden, {case['mode']} {layout}: {error:.1e}")
    if layout == "repeat":
        for name, mask in case["i2h_masks"].items():
            assert torch.equal(rnn.get_buffer(name.replace("mask_i2h", "mask")), torch.tensor(mask).float()), name
    if layout == "repeat" or case["mode"].startswith("RNN"):
        assert error <= 1e-5
    else:
        assert error > 1e-3  # gates of different neurons are no longer wired together


def test_text_example():
    rnn = SparseGraphRNN(EXAMPLE, "LSTM")
    case = GOLDEN["thesis_example"]
    index = layer_index(as_dag(case["edges"]))
    assert [index[node] for node in range(5)] == case["layer_index"] == [0, 0, 1, 2, 3]
    assert (rnn.layers, rnn.skips, rnn.dead_ends) == ([[0, 1], [2], [3], [4]], [(2, 0), (3, 1)], [])
    assert SparseGraphRNN([(0, 1), (0, 2), (2, 3)]).dead_ends == [1]


@pytest.mark.parametrize("mode", ["RNN_TANH", "RNN_RELU", "GRU", "LSTM"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_block_diagonal_call_equals_cell_by_cell(mode, batch_first):
    """The definition: each cell alone over its source's sequence, skip outputs added behind the non-linearity."""
    torch.manual_seed(0)
    rnn = SparseGraphRNN(random_graph("ws", 20, seed=3), mode, input_size=5, batch_first=batch_first)
    assert len(rnn.skips) > 2

    def alone(cell, x):
        kind = {"nonlinearity": mode[4:].lower()} if mode.startswith("RNN") else {}
        stock = (torch.nn.RNN if kind else getattr(torch.nn, mode))(x.shape[-1], cell.hidden_size, **kind)
        weights = (cell.wired(), cell.weight_hh, cell.bias_ih, cell.bias_hh)
        stock.load_state_dict(dict(zip(stock.state_dict(), weights)))
        return stock(x)[0]

    x = torch.randn(7, 3, 5)
    stored = []
    for i, cell in enumerate(rnn.recurrent_layers):
        out = alone(cell, stored[-1] if stored else x)
        for skip, (target, source) in zip(rnn.skip_layers, rnn.skips):
            out = out + alone(skip, stored[source]) if target == i else out
        stored.append(out)
    got = rnn(x.transpose(0, 1)).transpose(0, 1) if batch_first else rnn(x)
    assert torch.allclose(got, stored[-1], atol=1e-6)


def test_one_graph_under_compile():
    rnn = SparseGraphRNN(EXAMPLE, "GRU")
    x = torch.randn(2, 4, 2)
    assert torch.allclose(torch.compile(rnn, backend="eager", fullgraph=True)(x), rnn(x), atol=1e-6)


def test_must_05_masked_gradients_are_zero_and_stay_so():
    torch.manual_seed(0)
    rnn = SparseGraphRNN(random_graph("ba", 20, seed=1), "GRU")
    optimizer = torch.optim.AdamW(rnn.parameters(), 0.01, weight_decay=0.1)
    cells = [*rnn.recurrent_layers, *rnn.skip_layers]
    assert sum(int((cell.mask == 0).sum()) for cell in cells) > 100
    for _ in range(50):
        optimizer.zero_grad()
        rnn(torch.randn(4, 6, rnn.input_size)).square().mean().backward()
        assert not any(cell.weight_ih.grad[cell.mask == 0].any() for cell in cells)
        optimizer.step()
    assert not any(cell.weight_ih[cell.mask == 0].any() for cell in cells)
    assert all(cell.weight_ih[cell.mask == 1].all() for cell in cells)


def test_must_06_layer_index_is_the_longest_path():
    rng = np.random.default_rng(0)
    for trial in range(50):
        n = int(rng.integers(3, 25))
        chain = [(i, i + 1) for i in range(n - 1) if rng.random() < 0.5 or i == 0]
        edges = chain + [(int(u), int(v)) for u, v in rng.integers(n, size=(2 * n, 2)) if u < v]
        order = rng.permutation(n)  # a DiGraph keeps its directions, whatever the numbers of its nodes
        directed = nx.DiGraph([(int(order[u]), int(order[v])) for u, v in edges])
        directed = directed.subgraph(max(nx.weakly_connected_components(directed), key=len)).copy()
        index = layer_index(as_dag(directed))
        for node in directed:
            before = directed.subgraph(nx.ancestors(directed, node) | {node})
            assert index[node] == nx.dag_longest_path_length(before), trial
        assert all(index[u] < index[v] for u, v in directed.edges)


def test_single_edge_has_no_variance_and_says_so():
    with pytest.warns(UserWarning, match="edge_betweenness"):
        assert graph_properties([(0, 1)])["edge_betweenness_var"] == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graph_properties(EXAMPLE)["density"] == pytest.approx(6 / 20)


BAD = {
    "disconnected": [(0, 1), (2, 3)],
    "self loop": [(0, 1), (1, 1)],
    "cyclic": nx.DiGraph([(0, 1), (1, 2), (2, 0)]),
    "one node": nx.empty_graph(1),
    "no integers": nx.Graph([("a", "b")]),
    "no graph": 3,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_graphs_are_refused(name):
    with pytest.raises(ConfigurationError, match="graph"):
        SparseGraphRNN(BAD[name])


def test_other_bad_arguments_are_refused():
    for kwargs, argument in (
        ({"mode": "RNN"}, "mode"), ({"input_size": 0}, "input_size"), ({"gate_layout": "stack"}, "gate_layout"),
        ({"layers": [[0], [1, 2], [3], [4]]}, "layers"), ({"batch_first": 1}, "batch_first"),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=argument):
            SparseGraphRNN(EXAMPLE, **kwargs)
    with pytest.raises(ConfigurationError, match="n // 10"):
        random_graph("ba", 9)
    with pytest.raises(ConfigurationError, match="connected"):
        random_graph("ws", 50, seed=0, tries=0)
    with pytest.raises(ConfigurationError, match="x="):
        SparseGraphRNN(EXAMPLE)(torch.zeros(1, 2, 3))


def test_pack_reads_the_state_at_the_true_last_symbol():
    ids = encode(["BTXSE", "BTSSXSE"], 9).long()
    states = torch.arange(18.0).view(2, 9, 1)
    assert last_state(states, ids).flatten().tolist() == [4.0, 9 + 6.0]
    torch.manual_seed(0)
    network = SparseGraphRNNModule("ws", 12, seed=3).model.eval()
    longer = torch.nn.functional.pad(ids, (0, 20))
    assert torch.allclose(network(ids), network(longer), atol=1e-6)
    network.pack = False
    assert not torch.allclose(network(ids), network(longer), atol=1e-4)


def test_load_from_checkpoint_builds_the_same_wiring(tmp_path):
    torch.manual_seed(0)
    module = SparseGraphRNNModule("ba", nodes=12, seed=5, mode="LSTM")
    path = tmp_path / "saved.ckpt"
    saved = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save({**saved, "pytorch-lightning_version": "2.6.0"}, path)
    again = SparseGraphRNNModule.load_from_checkpoint(path, weights_only=True)
    ids = encode(reber(6)[0]).long()
    assert again.model.rnn.edges == module.model.rnn.edges
    assert torch.equal(again.eval()(ids), module.eval()(ids))
    assert again.report()["properties"]["nodes"] == 12
    with pytest.raises(ConfigurationError, match="no both weight"):  # sparse as it is: nothing for the callback
        recurrent_weights(again)


@pytest.mark.parametrize("invalid", ["random", "edit"])
def test_strings_obey_the_grammar(invalid):
    strings, labels = reber(400, seed=1, invalid=invalid)
    assert len(set(strings)) == 400
    assert labels.sum() == 200
    assert [is_reber(s) for s in strings] == labels.bool().tolist()
    assert all(MIN_LENGTH <= len(s) <= MAX_LENGTH and s[0] == "B" and s[-1] == "E" for s in strings)
    assert reber(400, seed=1, invalid=invalid)[0] == strings != reber(400, seed=2, invalid=invalid)[0]
    assert is_reber("BTSSXXTVVE")
    assert not is_reber("BTSSXXTVV")


def test_data_module_splits_and_encodes():
    data = ReberData(train=40, val=8, test=6, batch_size=8)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (8, MAX_LENGTH)
    assert batch["input_ids"].dtype == batch["label"].dtype == torch.int64
    assert [len(data.train_dataset), len(data.val_dataset), len(data.test_dataset)] == [40, 8, 6]
    parts = torch.cat([data.train_dataset.ids, data.val_dataset.ids, data.test_dataset.ids])
    assert len(parts.unique(dim=0)) == 54
    for kwargs, argument in (({"train": 1}, "train"), ({"invalid": "some"}, "invalid"), ({"batch_size": 0}, "batch")):
        with pytest.raises(ConfigurationError, match=argument):
            ReberData(**kwargs)


def test_must_08_and_09_small_sweep_fills_the_table(tmp_path):
    data = ReberData(train=500, val=0, test=100, batch_size=64)
    seen = []
    quiet = {"accelerator": "cpu"}
    sweep = GraphSweep(graphs=1, nodes=(12, 12), epochs=1, lr=5e-3, trainer=quiet)
    rows = sweep.run(data, on_row=seen.append)
    assert [row["kind"] for row in rows] == ["ws", "ba"]
    assert rows == seen
    assert set(rows[0]) == set(rows[1]) == {*OUTCOMES, *graph_properties(EXAMPLE)}
    assert all(row["loss"] < row["loss_before"] and row["nodes"] == 12 for row in rows)
    r = correlations(rows)
    accuracy = [row["accuracy"] for row in rows]
    for name, value in r.items():
        if np.std([row[name] for row in rows]) > 0 and np.std(accuracy) > 0:
            assert value == pytest.approx(np.corrcoef([row[name] for row in rows], accuracy)[0, 1])
        else:
            assert np.isnan(value), name
    with write_table(rows, tmp_path / "graphs.csv").open() as file:
        assert [row["kind"] for row in csv.DictReader(file)] == ["ws", "ba"]
    (again,) = sweep.run(data, skip={rows[0]["seed"]})  # a sweep that goes on trains the same graph in the same way
    assert {**again, "seconds": 0} == {**rows[1], "seconds": 0}


def test_correlations_are_numpys_and_regressors_find_a_rule():
    rng = np.random.default_rng(0)
    rows = [{"kind": "ws", "edges": float(e), "noise": float(n), "accuracy": 0.5 + e / 400} for e, n in
            zip(rng.uniform(20, 160, 60), rng.normal(size=60))]  # fmt: skip
    r = correlations(rows)
    for name in ("edges", "noise"):
        want = np.corrcoef([row[name] for row in rows], [row["accuracy"] for row in rows])[0, 1]
        assert r[name] == pytest.approx(want)
    scores = predictability(rows)
    assert set(scores) == {"bayesian_ridge", "random_forest", "ada_boost"}
    assert min(scores.values()) > 0.8
    for bad in (rows[:1], []):
        with pytest.raises(ConfigurationError, match="rows"):
            correlations(bad)
    with pytest.raises(ConfigurationError, match="rows"):
        predictability(rows[:10])
