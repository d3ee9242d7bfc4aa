"""Explain the report's figures: what they are, and how they were measured."""

from report.blocks import Bullets, Heading, Text

ABOUT_SPEED_UPS = """\
How many times as fast fastlm is as the fastest other implementation that ran, whichever that was at each size: a bar for the
median size, a dot for each. The tables' *speed-up* is over one and the same peer, the first that they list after fastlm's."""

ABOUT_ROOFLINE = """\
Each point is one size of one section: how many operations a second it reaches, over how many it has for each byte that has to
cross the memory bus. Nothing can be above the line, which was measured before and after the rows, unless the machine was not at
rest: the memory's bandwidth to the left, the peak of the arithmetic to the right."""

ABOUT_MODELS = """\
Models as they are (*before*) and with fastlm in them, by the one line that the row is named for; weights are random. *error* is
of the model's output (in training, of its first weights' gradient too) against the unchanged model in float64, on a smaller
input. *of limit* is the share of the arithmetic's peak: the floating-point operations of the products and convolutions of the
model as it is, padding included, over the time; a dash where torch runs a whole layer as one operation and does not count
it. fastlm's own TextVAE is *before* on torch's attention, with its latent written out in plain PyTorch, and its batches
padded, where fastlm packs them."""

ABOUT_GROWTH = """\
Time and memory as one size grows and nothing else does. The exponent b of a·n^b is fitted to the logarithms by least squares:
1 is proportional, 2 is quadratic; for threads, −1 is ideal. Small sizes are mostly overhead: it lowers exponents."""

ABOUT_MEMORY = """\
Peak extra memory of a call in float32, on a GPU in the first dtype of its section; the paler part is its results, gradients
included, which no implementation can do without."""

ABOUT_GOALS = """\
*of limit* is the row's share of what the machine allows; *the goal's* is the share that the goal would take: over 100 % it is
out of reach on this machine. Between 90 and 100 % it is hardly in reach, as the limit of attention is the rate of bare
multiply-adds, without loading an operand or taking an exponential: at head_dim 64 those are 7 vector operations beside the 128
of the products for as many scores, 5 % of the time at the least. A forward and backward that stores no noise draws it twice:
twice the time of `normal` for as many elements is a floor under `reparameterize_with_kl`, whatever the memory."""

METHOD = [
    Heading(2, "How it was measured"),
    Bullets(
        [
            "**Answers first.** Each fastlm row was checked against the reference in float64 before it was timed. *error* is "
            "that of its worst result (output or gradient): the largest error over the largest value. Each result is allowed "
            "twice what plain PyTorch in the same dtype gets wrong (gradients: three times), plus 4 ulps. Peers are not held "
            "to that; those whose noise is their own have no error. Where the reference would "
            "take too much memory or more than 3 s, a part is checked: the last 64 queries or the last head of attention, the "
            "first rows of a latent.",
            "**Time** is the median (p50) of a forward and backward where there are gradients, of the forward alone elsewhere; "
            "beside it the 20th and the 80th percentile. The implementations of one setting take turns, three each, of one "
            "call where it takes half a second and more. A run without `--full` ends within about twelve minutes: each setting "
            "has a share of the time that is left, and where it is used up, turns are left out; a row that got none says so "
            "below its table. Allocating the results counts, compiling and laying out inputs does not.",
            "**≈** behind a speed-up: one of the two spreads (p80 − p20) is wider than the difference of the medians, so that "
            "the figure says little.",
            "**Throughput** of attention counts the floating-point operations of its two products (five more in the backward), "
            "half of them where it is causal and the window's share where there is one: work that an implementation does "
            "beyond that does not count for it. Decoding counts the bytes of the cache, the VAE's latent its elements.",
            "**of limit**: the limit is what the machine allows, the best of two measurements in this run: the arithmetic's "
            "peak in the dtype, or the memory bandwidth where each input is read and each result written once per pass, "
            "whichever is less. The peak is the better of torch's matrix product (of sizes up to 2048, as far as "
            "two seconds go) and of bare "
            "multiply-adds on as many threads; the bandwidth is the better of torch's `copy_` (bytes read and written) and "
            "`sum` (bytes read) on 256 MiB. More than 100 % of the bandwidth means that data stayed in caches.",
            "**Peak memory** is how far the process's resident set rises above what it was before the call, its inputs being "
            "there: all that is allocated during the call, results and gradients included. Each in a process of its own, after "
            "warm-up, float32 only.",
            "**On a GPU** each round is one call, timed by CUDA events with a cold second-level cache. Its limit comes from "
            "the same bandwidths and from torch's products on that GPU, its peak memory from torch's allocator.",
            "**compiled** is `torch.compile`, for each size anew. **llama.cpp in float16** has weights and caches in float16, "
            "whatever the row's dtype, and no Python between its layers. A peer that is not installed (`pip install "
            "fastlm[peers]` has ONNX Runtime and JAX, `llama-cpp-python gguf` llama.cpp) or cannot do a call is named below "
            "its table, with the reason.",
            "In half precision a run without `--full` leaves out peers far slower than the first one there: eager code; of "
            "the forward without a mask, FlexAttention and JAX; of the latent, the compiled one.",
            "Speed-ups and ratios compare within one run, on the same threads.",
        ]
    ),
    Text("`fastlm bench --compare A.json B.json` tells what got slower between two runs, with the noise taken into account."),
]
