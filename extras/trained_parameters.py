"""Is everything trained that should be? Two looks at a run, before and after its first step.

    check_owned(objective, optimizer)
    check_gradients(objective)              # after the first backward pass
"""


def check_owned(objective, optimizer):
    """Every trainable parameter is the optimizer's: the published code forgot its projections."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    forgotten = []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad and id(parameter) not in owned:
            forgotten.append(name)
    if forgotten:
        first = ", ".join(forgotten[:5])
        raise RuntimeError(
            f"the optimizer does not own {len(forgotten)} trainable parameters, first {first}")


def check_gradients(objective):
    """After the first backward every trainable parameter has a gradient, or it would never move."""
    still = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    if still:
        first = ", ".join(still[:5])
        raise RuntimeError(f"{len(still)} trainable parameters get no gradient, first {first}")
