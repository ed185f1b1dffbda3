"""The monitor inside other tools: Lightning, TensorBoard, notebooks.

``import fisherfast`` imports nothing from here and needs none of these tools.
"""
