"""The ogbg workload: a graph network that predicts many properties of molecules."""

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from workloads_smoke import spec
from workloads_smoke.data.molecules import (
    NUM_EDGE_FEATURES,
    NUM_NODE_FEATURES,
    NUM_TASKS,
    GraphsTuple,
    gather_molecules,
    load_molecules,
)
from workloads_smoke.data.queue import Batch, Gather
from workloads_smoke.workloads.base import SmokeWorkload, WorkloadFacts
from workloads_smoke.workloads.layers import lecun_normal_
from workloads_smoke.workloads.losses import masked_loss
from workloads_smoke.workloads.metrics.average_precision import mean_average_precision
from workloads_smoke.workloads.placement import gather_rows_over_processes


class Perceptron(nn.Sequential):
    """One dense layer, layer norm and ReLU, with the official names; dropout is applied outside."""

    def __init__(self, inputs: int, outputs: int) -> None:
        layers: list[tuple[str, nn.Module]] = [
            ("dense_0", nn.Linear(inputs, outputs)),
            ("norm_0", nn.LayerNorm(outputs, eps=1e-6)),
            ("activation_fn_0", nn.ReLU()),
        ]
        super().__init__(OrderedDict(layers))


class GraphNetwork(nn.Module):
    """One round of updates of edges, nodes and globals (Battaglia et al. 2018, algorithm 1)."""

    def __init__(self, edge_width: int, node_width: int, global_width: int, hidden: int) -> None:
        super().__init__()
        self.update_edge_fn = Perceptron(edge_width + 2 * node_width + global_width, hidden)
        self.update_node_fn = Perceptron(node_width + 2 * hidden + global_width, hidden)
        self.update_global_fn = Perceptron(2 * hidden + global_width, hidden)

    def forward(self, graph: GraphsTuple, dropout: float) -> GraphsTuple:
        """Return the graphs with new features."""

        def update(function: nn.Module, *parts: Tensor) -> Tensor:
            return functional.dropout(function(torch.cat(parts, dim=-1)), dropout)

        numbers = torch.arange(len(graph.n_node), device=graph.nodes.device)
        graph_of_edge = numbers.repeat_interleave(graph.n_edge, output_size=len(graph.edges))
        graph_of_node = numbers.repeat_interleave(graph.n_node, output_size=len(graph.nodes))
        edges = update(
            self.update_edge_fn,
            graph.edges,
            graph.nodes[graph.senders],
            graph.nodes[graph.receivers],
            graph.globals[graph_of_edge],
        )
        nodes = update(
            self.update_node_fn,
            graph.nodes,
            sum_by(edges, graph.senders, len(graph.nodes)),
            sum_by(edges, graph.receivers, len(graph.nodes)),
            graph.globals[graph_of_node],
        )
        global_features = update(
            self.update_global_fn,
            sum_by(nodes, graph_of_node, len(numbers)),
            sum_by(edges, graph_of_edge, len(numbers)),
            graph.globals,
        )
        return graph._replace(nodes=nodes, edges=edges, globals=global_features)


def sum_by(rows: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Add up the rows of each group; returns shape (num_groups, features)."""
    return rows.new_zeros(num_groups, rows.shape[1]).index_add_(0, groups, rows)


class GraphModel(nn.Module):
    """Embeddings of atoms and bonds, rounds of updates, logits from the globals."""

    def __init__(self, width: int = 32, hidden: int = 48, num_rounds: int = 3) -> None:
        super().__init__()
        self.node_embedder = nn.Linear(NUM_NODE_FEATURES, width)
        self.edge_embedder = nn.Linear(NUM_EDGE_FEATURES, width)
        rounds = [GraphNetwork(width, width, NUM_TASKS, hidden)]
        rounds += [GraphNetwork(hidden, hidden, hidden, hidden) for _ in range(num_rounds - 1)]
        self.graph_network = nn.ModuleList(rounds)
        self.decoder = nn.Linear(hidden, NUM_TASKS)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                lecun_normal_(module)

    def forward(self, graph: GraphsTuple, dropout_rate: float) -> Tensor:
        """Return logits, shape (graphs, tasks)."""
        dropout = dropout_rate if self.training else 0.0
        graph = graph._replace(
            nodes=self.node_embedder(graph.nodes),
            edges=self.edge_embedder(graph.edges),
            globals=torch.zeros_like(graph.globals),
        )
        for network in self.graph_network:
            graph = network(graph, dropout)
        logits: Tensor = self.decoder(graph.globals)
        return logits


class OgbgWorkload(SmokeWorkload):
    """6000 graphs of 8 to 18 nodes, 16 properties, 30 % of the labels missing, 3 % wrong."""

    name = "ogbg"
    facts = WorkloadFacts(
        target_metric="mean_average_precision",
        larger_is_better=True,
        # Officially so, although the loss is a sigmoid cross-entropy per property.
        loss_type=spec.LossType.SOFTMAX_CROSS_ENTROPY,
        num_train_examples=6_000,
        num_eval_train_examples=800,
        num_validation_examples=800,
        num_test_examples=800,
        eval_batch_size=400,
        step_hint=600,
        max_allowed_runtime_sec=300,
        eval_period_time_sec=2,
        default_dropout_rate=0.1,
    )
    smoke_batch_size = 64
    output_parameters = ("decoder.weight", "decoder.bias")

    def __init__(self) -> None:
        super().__init__()
        # Logits, labels and presence of labels of the evaluation under way, by batch.
        self._scores: list[Tensor] = []

    def _build_model(self) -> nn.Module:
        return GraphModel()

    def _split_data(self, split: str) -> tuple[Gather, int]:
        if split == "eval_train":
            return gather_molecules(load_molecules("train")), self.facts.num_eval_train_examples
        molecules = load_molecules(split)
        return gather_molecules(molecules), len(molecules.labels)

    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> Tensor:
        logits: Tensor = model(batch["inputs"], dropout_rate)
        return logits

    def loss_fn(
        self,
        label_batch: spec.Tensor,
        logits_batch: spec.Tensor,
        mask_batch: spec.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, spec.Tensor]:
        """Sigmoid cross-entropy per property; see `Workload.loss_fn`. Valid examples are labels.

        Smoothing pulls labels towards one over the number of properties, as officially.

        Raises:
            ValueError: There is no mask, which alone tells absent labels (zero) from negative ones;
                officially that is an AttributeError.
        """
        if mask_batch is None:
            raise ValueError("ogbg: loss_fn needs mask_batch, the batch's 'weights', got None")
        labels = (1 - label_smoothing) * label_batch + label_smoothing / label_batch.shape[-1]
        losses = functional.binary_cross_entropy_with_logits(logits_batch, labels, reduction="none")
        return masked_loss(losses, mask_batch)

    def _batch_metrics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        logits = self._evaluate_logits(model, batch)
        labels, weights = batch["targets"], batch["weights"]
        loss = self.loss_fn(labels, logits, weights)
        self._scores.append(torch.stack([logits, labels, weights.float()]).transpose(0, 1))
        return {
            "loss": float(loss["summed"]),
            "accuracy": float((((logits > 0) == (labels > 0.5)) * weights).sum()),
            "count": float(loss["n_valid_examples"]),
        }

    def _measure(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        self._scores.clear()
        metrics = super()._measure(model, batches)
        rows = gather_rows_over_processes(torch.cat(self._scores)).cpu().numpy()
        logits, labels, present = rows.swapaxes(0, 1)
        return metrics | {self.target_metric_name: mean_average_precision(labels, logits, present)}

    def _final_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {name: sums[name] / sums["count"] for name in ("accuracy", "loss")}
