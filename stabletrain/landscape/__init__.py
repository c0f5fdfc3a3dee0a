"""The loss around the weights of a recorded run: planes, the path of its checkpoints, curvature, pictures."""
