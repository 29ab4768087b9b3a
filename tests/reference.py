"""
The yardstick: Eqs. 1-7 of Zhu et al. (2021), written as they stand in the paper, one loop for each sum.

Slow on purpose, in float64, and without a line of gaml_hf. Exits are positions in a list, from 0.
"""

import math


def log_softmax(logits):
    largest = max(logits)
    log_sum = math.log(sum(math.exp(logit - largest) for logit in logits))
    return [logit - largest - log_sum for logit in logits]


def ce_loss_reference(exit_logits, labels, weights, class_weights=None, smoothing=0.0):
    """
    Eq. 1, mean over the batch: `exit_logits[row][exit][label]`, `labels[row]` and one weight for each exit.

    Not the paper's: a row weighs as `class_weights[label]` says, and its target is 1 - smoothing at the label and an
    equal share of `smoothing` at each class.
    """
    total = 0.0
    for row, label in zip(exit_logits, labels, strict=True):
        for weight, logits in zip(weights, row, strict=True):
            log_p = log_softmax([float(x) for x in logits])
            loss = sum(-smoothing / len(log_p) * x for x in log_p) - (1 - smoothing) * log_p[int(label)]
            total += weight * (class_weights[int(label)] if class_weights else 1.0) * loss
    return total / len(exit_logits)


def kd_loss_reference(exit_logits, pairs, temperature=1.0):
    """Eq. 3, mean over the batch, sum over `pairs` of (teacher position, student position), times temperature^2."""
    total = 0.0
    for row in exit_logits:
        for teacher, student in pairs:
            log_p = log_softmax([float(x) / temperature for x in row[teacher]])
            log_q = log_softmax([float(x) / temperature for x in row[student]])
            for log_p_k, log_q_k in zip(log_p, log_q, strict=True):
                total += math.exp(log_p_k) * (log_p_k - log_q_k)
    return temperature**2 * total / len(exit_logits)


def alignment_reference(g_ce, g_kd, groups, alpha, mode, relative_floor=0.0):
    """
    Eqs. 5-7 for each group of parameters: `g_ce[parameter]` and `g_kd[parameter]` are flat lists of numbers.

    `relative_floor` is ours, not the paper's: the least |g_CE|^2 of a group, as a share of what would be its due if
    all parameters were alike.

    Returns g_GA, of the same shape, the coefficient `c` of each group, and the cosine of Eq. 4 over all parameters.
    """

    def dot(a, b, chosen):
        return sum(x * y for i in chosen for x, y in zip(a[i], b[i], strict=True))

    everything = range(len(groups))
    size = sum(len(g_ce[i]) for i in everything)
    g_ga, coefficients = [None] * len(groups), []
    for group in range(max(groups) + 1):
        chosen = [i for i in everything if groups[i] == group]
        floor = relative_floor * dot(g_ce, g_ce, everything) * sum(len(g_ce[i]) for i in chosen) / size
        ratio = dot(g_kd, g_ce, chosen) / max(dot(g_ce, g_ce, chosen), floor)
        for i in chosen:
            projected = [ratio * x for x in g_ce[i]]  # Eq. 5
            soft = [(1 - alpha) * x + alpha * y for x, y in zip(g_ce[i], projected, strict=True)]  # Eq. 6
            g_ga[i] = list(g_ce[i]) if mode == "hard" and ratio < 0 else soft  # Eq. 7
        coefficients.append(1.0 if mode == "hard" and ratio < 0 else (1 - alpha) + alpha * ratio)
    norms = math.sqrt(dot(g_ce, g_ce, everything)) * math.sqrt(dot(g_kd, g_kd, everything))
    return g_ga, coefficients, dot(g_ce, g_kd, everything) / norms
