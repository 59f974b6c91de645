"""Which learning rate, how many samples, which clipping threshold at step n: pure functions, no state, no torch.

Steps count from 1. Everything here depends on the settings and the step alone (the adaptive clipping threshold also on
the norms it is handed), so a resumed run, a forecast and a plot all see the same numbers.
"""
import math


def learning_rate(step, schedule, max_steps):
    """The learning rate of optimizer step `step` (1 ... max_steps), as a float.

    Linear warm-up from peak/W at step 1 to the peak at step W = lr_warmup_steps (Goyal et al. 2017, section 2.2, but never
    from 0, so that the first step trains; W = 0 and W = 1 both begin at the peak). After it, with p running from 0 at step
    max(1, W) to 1 at the last step:
    cosine      floor + (peak - floor) (1 + cos(pi p)) / 2      (Loshchilov and Hutter 2017, eq. 5, one cycle)
    linear      peak + (floor - peak) p
    constant    peak
    wsd         peak, then linear to the floor over the last lr_decay_steps steps (Hu et al. 2024, MiniCPM, section 4.2)
    points      peak x the factor interpolated between [step, factor] points, constant outside them; never below the floor
    """
    peak, floor, warmup = schedule.learning_rate, schedule.lr_min, schedule.lr_warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if schedule.lr_kind == "points":
        return max(floor, peak * interpolate(step, schedule.lr_points))
    peak_step = max(1, warmup)
    if schedule.lr_kind == "constant" or step == peak_step:
        return peak
    if schedule.lr_kind == "wsd":
        decay = min(schedule.lr_decay_steps or max(1, max_steps // 5), max_steps - peak_step)
        return peak + (floor - peak) * max(0, step - (max_steps - decay)) / decay
    progress = (step - peak_step) / (max_steps - peak_step)
    if schedule.lr_kind == "linear":
        return peak + (floor - peak) * progress
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def interpolate(step, points):
    """The value at `step` on straight lines through [[step, value], ...]; constant before the first and after the last."""
    if step <= points[0][0]:
        return points[0][1]
    for (left, a), (right, b) in zip(points, points[1:]):
        if step <= right:
            return a + (b - a) * (step - left) / (right - left)
    return points[-1][1]


def samples_at(step, config):
    """Samples that step `step` consumes: the last of schedule.batch_points at or before it, else micro-batch x accumulation."""
    due = [samples for first, samples in config.schedule.batch_points if first <= step]
    return due[-1] if due else config.samples_per_step


def samples_before(step, config):
    """Samples consumed by all steps before `step`: the position in the data stream where that step begins."""
    points = [(1, config.samples_per_step)] + [(max(1, first), samples) for first, samples in config.schedule.batch_points]
    total = 0
    for (first, samples), (following, _) in zip(points, points[1:] + [(step, 0)]):
        total += samples * max(0, min(following, step) - first)
    return total


def plan_steps(config, train_rows):
    """(max_steps, samples): optimizer steps of the run and samples they consume, from train.max_steps or train.epochs.

    With epochs the last step takes what is left, and may be smaller than the others.
    """
    if config.train.max_steps:
        return config.train.max_steps, samples_before(config.train.max_steps + 1, config)
    samples = max(1, round(config.train.epochs * train_rows))
    most = max([p[1] for p in config.schedule.batch_points] + [config.samples_per_step])
    steps = 1
    while samples_before(steps + 1, config) < samples:
        steps += max(1, (samples - samples_before(steps + 1, config)) // most)
    return steps, samples


def window_samples(step, config, total_samples):
    """(start, count): where step `step` begins in the sample stream and how many samples it takes, the last one maybe fewer."""
    start = samples_before(step, config)
    return start, min(samples_at(step, config), total_samples - start)


def clip_threshold(norms, schedule):
    """The gradient norm above which a step is scaled down; inf where clipping is off.

    norms: finite norms (before clipping) of earlier steps, oldest first. With clip_percentile p > 0 it is the p-th percentile of
    the last clip_window norms (AutoClip: Seetharaman et al. 2020, algorithm 1), never above clip_norm, and clip_norm itself
    until 10 norms are known.
    """
    if schedule.clip_norm == 0:
        return math.inf
    recent = sorted(norms[-schedule.clip_window:])
    if schedule.clip_percentile == 0 or len(recent) < 10:
        return schedule.clip_norm
    rank = schedule.clip_percentile / 100 * (len(recent) - 1)
    low = int(rank)
    high = min(low + 1, len(recent) - 1)
    return min(schedule.clip_norm, recent[low] + (recent[high] - recent[low]) * (rank - low))
