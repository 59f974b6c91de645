"""What to say of each finding: its likely cause and its remedy, by the finding's name, for someone who did not write the trainer.

Leaves out: when a finding is made (rules.py, health.py, alerts.py). docs/HEALTH.md has the thresholds and their reasons.
"""

CUT = (
    "Train ten steps on ten rows and look at the gradients. With gradient checkpointing set "
    "gradient_checkpointing_kwargs={'use_reentrant': False}, or call model.enable_input_require_grads(). Then check that the adapters "
    "have requires_grad=True, that the optimizer holds them, and that labels are not all -100. After the first backward pass every lora_B "
    "gradient must be non-zero.")
ROWS = (
    "Look at the rows of those steps. If they are in order, lower the rate, lengthen the warm-up, or clip lower.")
ADVICE = {  # name: (cause, remedy)
    "dead gradients": (
        "The path from the loss to the adapters is cut (gradient checkpointing over frozen embeddings does it), nothing trainable lies on "
        "it, or no token is supervised. Another learning rate, batch size or number of bits would not have cured it: an update made from "
        "a zero gradient is zero at any of them.",
        CUT),
    "steps without gradient": (
        "Those steps held no supervised token: answers cut off by the maximum length, or labels masked throughout.",
        "Count supervised tokens row by row; raise the maximum length or drop the rows without any."),
    "equal rewards": (
        "Every completion of a prompt got the same reward, so none was better than another.",
        "Harder or easier prompts, or a finer reward."),
    "gradient norm wrongly recorded": (
        "Something learnt, so gradients existed; the figure was taken after they were cleared, or by a backend that does not report it.",
        "Compute the norm yourself between the backward pass and the optimizer step."),
    "nothing left to learn": (
        "The rows are known by heart, and what is left of the gradient vanishes in rounding.",
        "Stop, or train on more rows."),
    "steps not applied": (
        "Their loss or gradient was not finite, or their windows held no supervised token.",
        "The rows of such steps are named on the console; mend or drop them, compute in bf16, or lower the rate."),
    "no step applied": (
        "No token is supervised: answers are cut off by the maximum length, are not found by the chat template, or all labels are masked.",
        "Look at some rows: python data.py CONFIG --preview 3 marks what is supervised. Then data.max_length and data.chat_template."),
    "non-finite": (
        "Overflow in fp16, a rate that is far too high, or a row without a supervised token (0/0).",
        "Compute in bf16, lower the rate, clip at 1.0, and look at the rows of the first bad step."),
    "fp16 search": (
        "A few such norms are how fp16 finds its loss scale; those steps are skipped.",
        "Nothing, if it stays at a few."),
    "loss of zero": (
        "No token is supervised (labels all -100, a response template that is not in the text), or the loss was not a number and was "
        "written as 0: the Trainer's logging_nan_inf_filter does so.",
        "Print one row's labels; the answer and its end-of-turn token must not be -100. Set logging_nan_inf_filter=False and look again."),
    "wrong gradients": (
        "The gradients are not those of the loss: a backward pass through the base is missing or wrong (a 4-bit layer's inference kernel, "
        "a detached tensor, an in-place change), or the loss was scaled and the gradient was not.",
        "Try another quantisation (model.quant=none) and memory.fused=false, and see which of them has true gradients. No setting of the "
        "schedule helps."),
    "always clipped": (
        "The threshold lies below the usual norm, so that it sets the size of every gradient.",
        "Nothing need be done: Adam cancels a constant factor."),
    "always clipped by far": (
        "The threshold lies so far below the usual norm that Adam's epsilon is no longer small beside the gradient, or the gradient is "
        "too large by the number of micro-batches.",
        "Clip near the usual norm. If that is above 100, see that the loss is divided by the tokens of the window."),
    "never clipped": (
        "The run was calm.",
        "Nothing need be done."),
    "spikes of the training loss": (
        "Broken or very long rows, or a rate at the edge of what the run bears.",
        ROWS),
    "spikes of the gradient norm": (
        "Broken or very long rows, or a rate at the edge of what the run bears.",
        ROWS),
    "plateau": (
        "It may be a plateau that ends, or all that this rate and these adapters can learn.",
        "Compare the evaluations. If they stand still too, stop here or try three times the rate."),
    "training loss flat": (
        "Nothing was learnt, the rate is far too low, or the model knew it already.",
        "See to faults first; then compare a rate ten times as high over the same steps."),
    "divergence": (
        "The rate is too high, or the gradients are wrong although they are not zero.",
        "Try a tenth of the rate. If the loss still climbs, the gradients are wrong: check the change of the loss along them by two "
        "forward passes."),
    "loss above guessing": (
        "The loss is not divided by what it was summed over (micro-batches, tokens), the labels are shifted or belong to another "
        "tokenizer, or the weights were damaged while loading.",
        "Compute the loss of one row by hand, and let the untrained model write an answer to one prompt."),
    "training and evaluation disagree": (
        "Before anything is learnt both are the same model's loss. They differ where one is not divided by the micro-batches, where one "
        "counts prompts and the other only answers, or where the rows are of another kind.",
        "Evaluate on a few training rows: the two must then agree. Else divide the loss by the supervised tokens of the whole window."),
    "rate ends at nothing": (
        "The schedule falls to zero, and the steps near its end teach next to nothing.",
        "Give the rate a floor of a tenth of its peak."),
    "high rate": (
        "One step of Adam moves each weight of B by about the rate, and by this one as far as the weights of A are large (1 / "
        "sqrt(width)). Training then diverges or stalls where the network saturates.",
        "Adapters train at 1e-4 to 1e-3. (Other optimizers than Adam count otherwise.)"),
    "learning rate of zero": (
        "The schedule or the optimizer got no rate.",
        "Set a learning rate above 0."),
    "small rate area": (
        "Few steps or a low rate.",
        "For adapters: more steps, or a peak of 1e-4 to 2e-4."),
    "coverage below one epoch": (
        "Too few steps or too few samples a step for this many rows. This explains weak learning.",
        ""),
    "adapters never moved": (
        "No update reached these matrices: no gradient, a rate of zero, or an optimizer that does not hold them.",
        CUT),
    "adapters do not start at zero": (
        "B is not 0 before training, so the model starts from a random change of what it knew.",
        "Initialise lora_B with zeros; only A is random (Hu et al. 2021, section 4.1)."),
    "evaluation frozen": (
        "Nothing changed the weights between these evaluations, or they were made on a stale copy of them. Little data or a low rate "
        "makes evaluations alike, not identical.",
        "Cure dead gradients first if there are any; then print one lora_B before and after a step, and evaluate the very model that the "
        "optimizer updates."),
    "evaluation worse than before training": (
        "The rate is too high, the evaluation rows are of another kind than the training rows, or the training rows were learnt by heart.",
        "Look whether the training loss fell: if not, lower the rate; if so, train on fewer epochs, or on rows like those of the "
        "evaluation."),
    "evaluation does not follow training": (
        "What is learnt is not what is evaluated: labels, template or masking differ between the two, the evaluation looks at "
        "stale weights, or its rows are of another kind.",
        "Evaluate on a few training rows. If that is not the training loss either, print one row's input and labels on both paths."),
    "growing gap": (
        "The adapters learn the training rows by heart.",
        "Train on fewer epochs, more rows, or with dropout."),
    "damage by quantisation": (
        "Quantisation changed the model by far more than it usually does, or the untrained adapters are not at zero.",
        "Compare --model.quant=int8 or none; see that the weights are those that the quantisation was made for."),
    "samples never stop": (
        "The token that ends an answer is not supervised, is masked as padding, or is not the one that generation stops at.",
        "Print one row's labels: the last supervised token must be the template's end-of-turn token, and generation must stop at it."),
    "samples repeat themselves": (
        "A rate that is too high, a template that differs between training and generation, or very few steps.",
        "Compare the samples before training. If those were fine, lower the rate; then compare the rendered prompt with a training row's."),
    "samples do not follow the loss": (
        "The loss is measured on other targets than what is written: labels shifted, or another template in training than in generation.",
        "Print one row's input and label side by side: each label is the next input token. Compare the rendered prompt with a training "
        "row's."),
    "noisy gradients": (
        "The gradients of single samples point in very different directions, so a step of few samples follows mostly noise.",
        "A larger batch (schedule.batch_points lets it grow) buys nearly as much as it costs; or keep it and go on longer."),
}
