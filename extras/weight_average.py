"""An average of the weights that training passes through: train.py --ema DECAY.

    average = WeightAverage(student, 0.999)
    average.update(student, step)              # after every step
    scores = evaluate(average.model, dataset)

The last steps of training wander about a good place; their mean is nearer to it than any of them.

References
  Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992
"""

import copy

import torch


class WeightAverage:
    """model = decay * model + (1 - decay) * student, over all weights and statistics.

    The first steps count for more, or the fresh weights would be in the average for ever: the decay
    rises as (1 + step) / (10 + step) until it is `decay`.
    """

    def __init__(self, student, decay):
        self.decay = decay
        self.model = copy.deepcopy(student).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, student, step):
        """step counts from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = student.state_dict()
        for name, mean in self.model.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(current[name], 1 - decay)
            else:
                mean.copy_(current[name])                         # a count of batches
