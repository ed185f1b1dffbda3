"""The monitor inside other people's tools: Lightning, TensorBoard, notebooks.

Nothing here is imported by ``import fisherfast``, and none of these tools is needed by it.
"""
