"""torch.compile in a run. The graphs run as they are, without a C++ compiler."""

import torch

from rsa_detectron2.pretrain.engine import trainer as train_loop
from tests.conftest import tiny_cfg


def sizes(values):
    """The sizes of a graph's inputs; those that may vary are no int."""
    return [size for value in values for size in getattr(value, "shape", [value])]


def test_knn_makes_no_graph_and_leaves_those_of_training_static(image_folder, tmp_path, monkeypatch):
    """Its batches have other sizes than the training's, before the first step and after each epoch."""
    compile_, evaluate, graphs, made = torch.compile, train_loop.evaluate_knn, [], []

    def backend(graph, inputs):
        graphs.append(sizes(inputs))
        return graph.forward

    def counted(*arguments, **options):
        before = len(graphs)
        top1 = evaluate(*arguments, **options)
        made.append(len(graphs) - before)
        return top1

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda call, **options: compile_(call, backend=backend, **options))
    monkeypatch.setattr(train_loop, "evaluate_knn", counted)
    train_loop.train(tiny_cfg(image_folder, tmp_path, "SOLVER.COMPILE", True, "KNN.PERIOD", 1))
    torch._dynamo.reset()
    assert made == [0] * 4  # untrained, and after each of three epochs
    assert len(graphs) == 2  # the online backbone and the target's
    assert all(type(size) is int for graph in graphs for size in graph)
