"""What to look for in each picture: printed with it, kept in it, and shown by `--help`."""


def one_line(text: str) -> str:
    """Text that is wrapped in the source -> text that is not."""
    return " ".join(text.split())


_TEXTS = {
    "strip": """
        The upper row is what the network is given, the middle row what it takes it for: the clean picture
        that it already sees in the noise. Layout and main colours are there after a few steps, while the
        upper row is still snow; edges and details come last. The lower row is bright where the prompt pushes,
        that is, where the noise seen with the prompt differs most from the noise seen without.""",
    "curves": """
        The prompt's push is small beside the noise itself, which is why guidance multiplies it. Where the
        curves on the right are flat, further steps only polish.""",
    "words": """
        Dark red is where a word was looked at most, each word on a scale of its own; the number below is its
        share of all attention. In a well-trained model nouns light up on their things, colours on what they
        colour, and small words like “a” or “on” everywhere, or nowhere in particular. The start token is no
        word: it takes the attention that no word deserves.""",
    "words-by-step": """
        Each row is a word, from the first step to the last. Early maps are broad, because there is only
        layout to decide; later ones follow edges. A word whose map stays even has little to say about
        places.""",
    "words-by-layer": """
        Each row is a word, each column a layer of the U-Net, from its way down through the middle to its way
        up; the grid below is how finely the layer sees. Coarse layers decide what goes where, fine ones which
        edge belongs to which word. Layers disagree, and no single one is the explanation.""",
    "words-by-head": """
        Each row is a layer, each column one of its heads, all for one word. Heads of the same layer look at
        different things: some follow the subject's outline, some the background, and some never look at the
        word at all.""",
    "pixel": """
        Self-attention is how a place in the picture finds out about others. The cross is the place that was
        chosen; red is where it looks. It looks at places that are like it: the rest of its own thing, or all
        of the background.""",
    "cfg": """
        Guidance exaggerates what the prompt changes: ε = ε_uncond + s (ε_cond − ε_uncond). At s = 1 there is
        none, and the picture is what the network thinks likely: soft, and now and then something else. With
        more, the subject gets clearer and the seeds get more alike. With too much, colours burn out and
        shapes break, because the latents leave the range that the decoder knows. Look for the smallest s that
        does what was asked.""",
    "steps": """
        From left to right the same noise gets more steps. Few steps give a blurred picture, the mean of all
        that could be meant; the number below says how far a picture is from the one with most steps. A
        sampler that adds no noise (ddim, dpmpp_2m) settles on one picture, and higher-order ones settle
        sooner; one that adds noise (ddpm, euler_a) keeps finding other pictures. With a single step ddim and
        euler_a leave nearly all the noise where it is, because the one timestep that they look at is the
        last, t = 1.""",
    "samplers": """
        One noise, one number of steps, and every way back that there is. Those that solve the same equation
        without adding noise agree in layout and differ in finish; those that add noise (ddpm, euler_a,
        dpmpp_sde) draw another picture altogether. Calls is how often the U-Net ran, which is what a picture
        costs.""",
    "seeds": """
        A walk from the noise of one seed to that of another. The upper row walks on the sphere (slerp,
        Shoemake 1985), where every stop is as long as Gaussian noise should be, and is a fair picture. The
        lower row walks straight through the ball: half-way the noise is too short, by 1/√2, and the picture
        loses contrast and detail. The walk is smooth in places and jumps in others, where the network changes
        its mind.""",
    "prompts": """
        A walk from the vectors of one prompt to those of another, with the noise kept. Nothing was trained to
        make the stops in between mean anything, yet most are pictures. Look for where the change happens:
        often in a single step, when one reading wins over the other, and at places that both pictures share
        nothing moves.""",
    "ablate": """
        One thing at a time is taken away; the number says how far the picture moves. First row: a word's
        vectors are replaced by those of the empty prompt at the same places. Second row: the word is left out
        of the prompt. Where the first hardly matters and the second does, the word lives on in the vectors
        after it, which the text encoder let look back. Third row: a layer's cross-attention is silent.
        Fourth: one head of the layer that mattered most.""",
    "latents": """
        The picture as the U-Net knows it: a few small channels, which are neither colours nor layers of a
        picture. Blue is below zero, red above. Below each is what the decoder makes of the latents when that
        channel is evened out to its mean: what goes missing is what the channel is for.""",
    "vae": """
        The encoder makes 192 numbers, 8×8 pixels in three colours, into 4, and the decoder has to guess the
        rest. Flat areas and large shapes survive; thin lines, small letters and fine stripes do not, and no
        number of denoising steps will bring them back. The error is shown four times as strong. σ is how
        unsure the encoder is, place by place: darker is surer.""",
    "schedule": """
        Above: how much picture and how much noise is in x_t. Where the curves cross, they are equal: the
        signal-to-noise ratio is 1. Below: a picture under that much noise, which is all that the network has
        to go by. Most of the layout is decided where the noise still wins. The ticks are the timesteps at
        which each sampler calls the network: the tighter they stand, the more care it takes there.""",
    "tokens": """
        Each box is one token, with its number and, below, its place; neighbours of one colour are pieces of
        one word. Common words are one token, rare ones are put together from pieces. Below is how: from
        single letters, always the pair first that the vocabulary learned first; “_” marks where a word ends.
        Start and end are tokens too, and the rest is padding, at which the U-Net looks as well.""",
    "halves": """
        Each prompt names two things, and which is on the left. Red is where the first word was looked at,
        blue where the second. If attention follows the words, red is on the left and blue on the right: then
        more than half of a word's attention is on its own side. IoU compares the word's map, cut at 0.4 of
        its maximum, with the pixels of its side that are not background. Chance is a share of one half.""",
    "bugs": """
        Left the picture as it should be, right with the mistake, from the same words and seed. Some scream,
        some whisper: the quiet ones are those that stay in code for years. Below each is the number that
        gives it away, first right, then wrong. `reifusion/explain/bugs.py` names the test that finds it.""",
}
GUIDE = {name: one_line(text) for name, text in _TEXTS.items()}
