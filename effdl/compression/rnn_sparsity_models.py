"""rnn-sparsity: classifiers of symbol strings, with stacked recurrent layers or wired by a graph.

Example::

    from effdl.compression.rnn_sparsity_models import RecurrentClassifier

    data = ReberData(train=4000, val=1000, batch_size=64)
    pruning = RNNPruningCallback(sparsity=0.8, start="8ep")
    Trainer(max_epochs=9, gradient_clip_val=5, callbacks=[pruning]).fit(RecurrentClassifier("GRU"), data)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from effdl.compression.rnn_sparsity import GATES, PAPER, SparseGraphRNN
from effdl.compression.rnn_sparsity_graphs import KINDS, graph_properties, random_graph
from effdl.core.contract import ContractExample
from effdl.core.errors import check, check_choice, check_integer
from effdl.core.paper import Paper
from effdl.tasks.image import ImageClassifier

PADDING = 0


def last_state(states: Tensor, ids: Tensor) -> Tensor:
    """States [B, T, H] at the last symbol that is no padding, [B, H]; ids int64 (B, T), zeros on the right.

    What ``pack_padded_sequence`` would give in one direction, without asking the device for the lengths.
    """
    last = ((ids != PADDING).sum(1) - 1).clamp(min=0)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)


class SymbolNet(nn.Module):
    """Embedding, a recurrent network, and a linear read-out of its last state: ids int64 (B, T) -> logits (B, C).

    Args:
        rnn: maps [B, T, ``embedding_size``] to [B, T, ``features``], alone or first of a tuple.
        embedding_size, features: widths in front of ``rnn`` and behind it.
        vocab_size: number of symbols, 0 being padding.
        num_classes: C.
        pack: the state at the true last symbol; ``False``: at the last position, padded or not, as in the thesis.
    """

    def __init__(
        self, rnn: nn.Module, embedding_size: int, features: int, vocab_size: int, num_classes: int, pack: bool
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.rnn = rnn
        self.head = nn.Linear(features, num_classes)
        self.pack = pack

    def forward(self, ids: Tensor) -> Tensor:
        states = self.rnn(self.embedding(ids))
        states = states if isinstance(states, Tensor) else states[0]
        return self.head(last_state(states, ids) if self.pack else states[:, -1])


class RecurrentClassifier(ImageClassifier):
    """Cross-entropy training of stacked recurrent layers on strings: the dense network that the thesis prunes.

    Args:
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"GRU"`` or ``"LSTM"``: a plain ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``.
        hidden_size, num_layers, embedding_size: of the network; 50, 3 and 50 in the thesis.
        num_classes, vocab_size: with ``effdl run`` linked to the data module's.
        pack: the state at the true last symbol; ``False``: at the last position, padding included.
        optimizer, scheduler: as of :class:`~effdl.tasks.image.ImageClassifier`; clip the gradient norm at 5.

    Batches are dicts with ``input_ids`` int64 (B, T), zeros on the right, and ``label`` (B,), or tuples ``(ids, y)``.

    Raises:
        ConfigurationError: unknown mode, a size below 1.

    Example::

        module = RecurrentClassifier("LSTM", hidden_size=32, num_layers=2)
        Trainer(max_epochs=8, gradient_clip_val=5).fit(module, ReberData(batch_size=64))
    """

    def __init__(
        self,
        mode: str = "GRU",
        hidden_size: int = 50,
        num_layers: int = 3,
        embedding_size: int = 50,
        num_classes: int = 2,
        vocab_size: int = 128,
        pack: bool = True,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check_choice("mode", mode, GATES)
        for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers), ("vocab_size", vocab_size)):
            check_integer(name, value, 1)
        check_integer("embedding_size", embedding_size, 1)
        check(isinstance(pack, bool), "pack", pack, "True or False")
        kind = {"nonlinearity": mode[4:].lower()} if mode.startswith("RNN") else {}
        make = nn.RNN if kind else getattr(nn, mode)
        rnn = make(embedding_size, hidden_size, num_layers, batch_first=True, **kind)
        network = SymbolNet(rnn, embedding_size, hidden_size, vocab_size, num_classes, pack)
        super().__init__(network, num_classes, optimizer=optimizer, scheduler=scheduler)


class SparseGraphRNNModule(ImageClassifier):
    """Trains a random-graph recurrent network to classify strings (Darji 2021, chapter 4).

    Embedding as wide as the graph's first layer, :class:`~effdl.compression.rnn_sparsity.SparseGraphRNN`, linear
    read-out of the last step. ``hparams`` hold the edges, so ``load_from_checkpoint`` builds the same wiring. A step
    takes one kernel call per layer of the graph: about 0.1 s for 35 nodes, 128 strings of 53 symbols on one CPU core.

    Args:
        graph: ``"ws"``, ``"ba"`` (a random one of ``nodes`` nodes), or a list of edges ``[[0, 2], [1, 2], ...]``.
        nodes: of a random graph, at least 10; the thesis draws 10 to 50.
        seed: of a random graph.
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"GRU"`` or ``"LSTM"``.
        gate_layout: see ``SparseGraphRNN``; ``"repeat"`` is the thesis's code.
        num_classes, vocab_size: with ``effdl run`` linked to the data module's.
        pack: the state at the true last symbol; ``False`` (the thesis): at the last position, padding included, so that
            accuracy depends on the padding.
        optimizer, scheduler: as of :class:`~effdl.tasks.image.ImageClassifier`; the thesis: Adam 1e-3, 15 epochs, batch
            128, gradient norm clipped at 5.

    Batches are dicts with ``input_ids`` int64 (B, T), zeros on the right, and ``label`` (B,), or tuples ``(ids, y)``.

    Raises:
        ConfigurationError: an argument out of range; edges with cycles, self loops or several components.

    Example::

        module = SparseGraphRNNModule("ws", nodes=30, mode="GRU")
        Trainer(max_epochs=15, gradient_clip_val=5).fit(module, ReberData(batch_size=128))
        print(module.report()["dead_ends"])
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        graph: str | list[list[int]] = "ws",
        nodes: int = 30,
        seed: int = 0,
        mode: str = "GRU",
        gate_layout: Literal["tile", "repeat"] = "tile",
        num_classes: int = 2,
        vocab_size: int = 128,
        pack: bool = True,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check_integer("nodes", nodes, 10)
        check_integer("seed", seed, 0)
        check_integer("vocab_size", vocab_size, 1)
        check_integer("num_classes", num_classes, 2)
        check(isinstance(pack, bool), "pack", pack, "True or False")
        check(not isinstance(graph, str) or graph in KINDS, "graph", graph, "'ws', 'ba' or a list of edges")
        rnn = SparseGraphRNN(random_graph(graph, nodes, seed) if isinstance(graph, str) else graph, mode,
                             gate_layout=gate_layout)  # fmt: skip
        network = SymbolNet(rnn, rnn.input_size, rnn.output_size, vocab_size, num_classes, pack)
        super().__init__(network, num_classes, optimizer=optimizer, scheduler=scheduler)
        self.save_hyperparameters("nodes", "seed", "mode", "gate_layout", "num_classes", "vocab_size", "pack")
        self.hparams["graph"] = [list(edge) for edge in rnn.edges]  # the wiring itself, whatever drew it

    def report(self) -> dict[str, Any]:
        """Layers and edges of the graph, its statistics, and the nodes whose output goes nowhere."""
        rnn = self.model.rnn
        into = {layer: [source for target, source in rnn.skips if target == layer] for layer in range(len(rnn.layers))}
        rows = {
            f"layer {i}": {"nodes": len(layer), "skips_from": ", ".join(map(str, into[i]))}
            for i, layer in enumerate(rnn.layers)
        }
        told = graph_properties(rnn.edges)
        name = f"{rnn.mode} of {told['nodes']} nodes"
        wiring = {"edges": [list(edge) for edge in rnn.edges], "dead_ends": rnn.dead_ends}
        return {"layers": rows, **wiring, "properties": told, "after": {"name": name}}

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite: twelve nodes, strings of the Reber grammar."""
        free = dict.fromkeys(("optimizer", "scheduler"), ContractExample.ANY)
        return ContractExample(
            kwargs={"graph": "ba", "nodes": 12, "mode": "GRU"},
            data=example_strings,
            example_input=example_input,
            bad={
                "graph": ["er", [[0, 1], [1, 1]], [[0, 1], [2, 3]], [], 3],
                "nodes": [9, 2.5],
                "seed": -1,
                "mode": "GRUU",
                "gate_layout": "stack",
                "num_classes": 1,
                "vocab_size": 0,
                "pack": "yes",
                **free,
            },
        )


def example_strings(batch_size: int) -> Any:
    """The contract suite's loader: eight batches of four strings, in an order from (seed, epoch)."""
    from effdl.data.reber import ReberData

    return ReberData(train=32, val=0, test=0, batch_size=batch_size, seed=3).train_dataloader()


def example_input(_module: Any) -> tuple[Tensor]:
    """For export, which unrolls the kernels over time: the first twelve symbols of the first batch."""
    return (next(iter(example_strings(4)))["input_ids"][:, :12],)
