"""What to look for in each picture: printed with it, kept in it, and shown by `--help`."""


def one_line(text: str) -> str:
    """Text that is wrapped in the source -> text that is not."""
    return " ".join(text.split())


_TEXTS = {
    "strip": """
        The upper row shows the network's input, and the middle row the clean picture that the network already
        sees in that noise. Layout and main colours are there after a few steps, while the upper row is still
        snow; edges and details come last. The lower row is bright where the prompt pushes, that is, where the
        noise seen with the prompt differs most from the noise seen without; the number is the root mean
        square of that difference.""",
    "curves": """
        The prompt's push is small beside the noise itself, which is why guidance multiplies the push. Where
        the curves on the right are flat, further steps only polish.""",
    "toy-noising": """
        Above: the same data under more and more noise. Below: where the best possible network points. Each
        arrow points to the mean of all data that the place may come from, given that much noise, and is drawn
        at two fifths of its length. Where much
        noise is, that is the middle of everything, the same for all places; where little is, the nearest
        piece of the curve. A sampler follows these arrows, a little each time, and asks again with less
        noise.""",
    "toy-learning": """
        A network that is only ever asked “which noise is in this point?” ends up drawing the curve. Its
        loss does not go to 0: from a noisy point nobody can tell the noise for certain. The dotted line is
        the loss of the best possible answers, so what counts is the distance between the two.""",
    "toy-paths": """
        All three begin at the same circles and use a network that knows everything. DDPM adds fresh noise in
        each step and wanders; DDIM and rectified flow add none. A flow is trained on straight lines, but
        through each place many of them pass, and the network follows their mean, which bends: first to the
        middle of everything, then outwards. Even the flow's paths are not straight.""",
    "toy-guidance": """
        At s = 0 the word counts for nothing, and at s = 1 the points are as the data that have that word.
        Beyond that they are pushed away from all that lacks the word: first they leave the end of their half
        that is near the other one, and with too much guidance they leave the data. So guidance buys certainty
        about the word, and pays with variety.""",
    "toy-orders": """
        The exact network is followed with fewer and more calls, and compared with the exact solution. The
        slope is the order of a solver: with twice the calls, Euler's error halves, and that of second-order
        solvers falls to a quarter. Heun pays two calls for each step; DPM-Solver++ 2M remembers the last
        one instead.""",
    "words": """
        Dark red marks the places that looked at a word most; all words have one scale, the bar below, and the
        number under each is its share of all attention. In a well-trained model nouns light up on their
        things, colours on the things that they colour, and small words like “a” or “on” everywhere, or
        nowhere in particular. The start token is no word: it takes the attention that no word needs.""",
    "words-by-step": """
        Each row is a word, from the first step to the last. On large models early maps are broad, as only the
        layout is being decided, and later maps follow edges; a small model may know from the first step. A
        word whose map stays even has little to say about places.""",
    "words-by-layer": """
        Each row is a word, and each column is a layer of the U-Net, from its way down through the middle to
        its way up; the grid below says how finely the layer sees. Layers share the work, and no single one is
        the explanation: look where a noun is read, and where a colour.""",
    "words-by-head": """
        Each column is a layer, and below each other are its heads, all for one word. Heads of the same layer
        look at different things: some follow the subject's outline, some the background, and some never look
        at the word at all.""",
    "pixel": """
        Through self-attention a place in the picture learns about other places. The cross is the chosen
        place; red marks where it looks, on one scale in all panels. A place looks at places that are like it.
        On things that are symmetric, the place most like it is often its mirror image.""",
    "cfg": """
        Guidance exaggerates what the prompt changes: ε = ε_uncond + s (ε_cond − ε_uncond). At s = 1 there is
        no guidance, and the picture is one that the network thinks likely. A model that knows many pictures
        for a prompt may then draw something else now and then; with more guidance the subject gets clearer
        and the seeds get more alike. With too much, colours burn and shapes break, because the latents leave
        the range that the decoder knows. Look for the smallest s that gives the picture you asked for.""",
    "steps": """
        From left to right the same noise gets more steps. With a single step dpmpp_2m shows the mean of
        all pictures that could be meant, blurred; ddim and euler_a leave nearly all the noise where it is,
        because the only timestep that they look at is the last, t = 1. The number below says how far a
        picture is from the one with most steps in its row. A sampler that adds no noise (ddim, dpmpp_2m)
        settles on one picture; one that adds noise (ddpm, euler_a) goes on changing it, by as much as the
        prompt leaves open. Which settles soonest is measured in chapter 9, with the same noise levels for
        all.""",
    "samplers": """
        All pictures have the same noise and the same number of steps, and each has another sampler. Samplers
        that solve the same equation without adding noise agree; samplers that add noise (ddpm, euler_a,
        dpmpp_sde) end elsewhere, and near each other where the seed gives them the same fresh noise. “Calls”
        says how often the U-Net ran, which decides how long a picture takes; “away” is the distance from the
        picture of the first sampler that adds none.""",
    "seeds": """
        Both rows walk from the noise of one seed to that of another. The upper row walks on the sphere
        (slerp, Shoemake 1985), where the noise at every stop is as long as Gaussian noise should be and gives
        a good picture. The lower row walks straight through the ball: half-way the noise is too short, by a
        factor of 1/√2. A sampler that adds no noise on the way (ddim) then draws a flatter picture; one that
        adds noise (euler_a) replaces it, and hardly notices. The contrast below each picture tells.""",
    "prompts": """
        Each row walks from the vectors of one prompt to those of another and keeps the noise. Nothing was
        trained to give the stops in between a meaning, yet most are good pictures. Look for where the change
        happens: often in a single step, when one reading wins over the other, while nothing moves at places
        that both pictures share.""",
    "swap": """
        A place finds a word by the word's key, and receives its value. Here the keys of two words have
        changed places, and nothing else: every place that looks for the one receives the other. “Likeness”
        compares only the colours of the left and of the right: 1 if they have stayed, -1 if they have changed
        sides. Shapes do not count: where each thing keeps its own colour word, the things may change places,
        and likeness stays 1.""",
    "ablate": """
        One thing at a time is taken away; the number says how far the picture moves. First row: a word's
        vectors are replaced by those of the empty prompt at the same places. Second row: the word is left out
        of the prompt. If the first change hardly matters and the second does, the word lives on in the
        vectors after it, because the text encoder lets later words look back. Third row: a layer's
        cross-attention is silent. Fourth row: one head is silent, in the layer that mattered most.""",
    "latents": """
        This is the picture as the U-Net knows it: a few small channels in which its shapes can be seen,
        though no channel is a colour. Blue is below zero, red is above. Below each channel is the decoded
        picture when that channel is evened out to its mean: whatever goes missing is the channel's task.""",
    "vae": """
        Flat areas and large shapes survive; thin lines, small letters and fine stripes do not, and no
        number of denoising steps will bring them back. The error is shown four times as strong as it is. σ
        says how unsure the encoder is at each place: darker is surer.""",
    "schedule": """
        The curves say how much picture and how much noise is in x_t. Where they cross, the two are equal: the
        signal-to-noise ratio is 1. Below them is a picture under that much noise, which is all that the
        network has to go by. Most of the layout is decided while there is still more noise than picture. The
        ticks are the timesteps at which each sampler calls the network: the closer they stand, the more care
        it takes.""",
    "tokens": """
        Each box is one token, with its number and, below, its position; neighbours of one colour are pieces
        of one word. Common words are one token, and rare words are put together from pieces. The lower part
        shows how: the merging begins with single letters and always takes the pair that the vocabulary
        learned first; “_” marks the end of a word. Start and end are tokens too, and the rest is padding, at
        which the U-Net looks as well.""",
    "halves": """
        Each prompt names two things, one on the left and one on the right. Red marks the places that looked
        at the first word, blue those that looked at the second. If attention follows the words, red is on the
        left and blue on the right: then more than half of a word's attention is on its own side. By chance it
        would be one half. IoU compares the word's map, cut at 0.4 of its maximum, with the pixels of its side
        that are not background.""",
    "bugs": """
        The left picture of each three is correct, the next one has the mistake, from the same words and seed,
        and the third shows eight times the difference. Some mistakes scream, some whisper: the quiet ones
        stay in code for years. Below is the number that gives the mistake away, first when right, then with
        the mistake, and what it measures. `reifusion/explain/bugs.py` names the test that finds it.""",
}
GUIDE = {name: one_line(text) for name, text in _TEXTS.items()}
