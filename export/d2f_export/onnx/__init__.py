"""Export to ONNX: the graph, its weights, the artefact, and its verification."""
