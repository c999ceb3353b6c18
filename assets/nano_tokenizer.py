"""Builds the nano model's tokenizer and processor files in assets/nano (standard library only, same bytes every time).

Usage: python assets/nano_tokenizer.py [OUT_DIR]

A byte-level BPE with Qwen2.5-VL's special tokens and chat template and a vocabulary of 2,048 rows, laid out as

    0 ..  245   the bytes, without the ten digits
  246 .. 1245   the integers 0 to 999, so that a coordinate is one token and its id is 246 + the number
 1246 ..        whole pieces: the fixed scaffolding of an answer, object names, the words of the prompts
      .. 2025   merges learned from the corpus below, for words nobody listed
 2026 .. 2047   the 22 special tokens of Qwen2.5

`ignore_merges` makes every piece in the vocabulary one token without the chain of merges that would lead to it.
The scaffolding (```json [{"bbox_2d":[ and so on) is cut out by the split pattern itself: a valid grounding turn costs 12 tokens.
"""
import json, os, sys
from collections import Counter

OUT = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(os.path.abspath(__file__)), "nano")
ROWS = 2048

# Qwen2.5's added tokens in their order; the first fourteen are control tokens, the rest plain added tokens, as in Qwen's file.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
           "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
ADDED = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]

# Fixed pieces of an answer, each one token. Longest first where one is the beginning of another.
SCAFFOLD = ['```json\n[{"bbox_2d":[', '```json\n[{"image":', ',"bbox_2d":[', '"},{"bbox_2d":[', '"},{"image":', '],"label":"', '"}]\n```',
            " \\boxed{}", "\\boxed{", "<think>", "</think>", "<answer>", "</answer>"]

# The rest is the usual GPT-4/Qwen split, but with numbers in groups of up to three digits.
WORD_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Names of things that are easy to draw; they shape the learned merges.
OBJECTS = """airplane alien ambulance anchor ant apple avocado axe backpack bacon badger bagel ball balloon banana barrel basket bat battery beach bean
bear beaver bed bee beer beetle bell bicycle bike bird bison blowfish boar boat bomb bone book boot bottle bouquet bowl bowling box brain bread brick bridge
briefcase broccoli broom bucket bug bulb burger burrito bus butter butterfly button cactus cake calendar camel camera canary candle candy canoe car card carrot
castle cat chair cheese cherry chestnut chick chicken chocolate clock cloud clover coat coconut coffee coin compass computer cookie corn couch cow cowboy crab
cricket crocodile croissant crown cucumber cup cupcake dart deer desk diamond dodo dog dolphin donkey donut door dove dragon dress drum duck eagle ear egg eggplant
elephant elevator envelope eye factory falafel feather ferry fire fish flag flamingo flashlight flower fly flute folder foot fork fountain fox frog garlic gem
ghost gift giraffe glass glasses globe gloves goat goose gorilla grapes guitar hammer hamster hand harp hat hedgehog helicopter helmet hippopotamus honey horse
hospital house hyena jar jeans joystick kangaroo kettle key kite kiwi knife koala lab ladder ladybug lamp lantern leaf leek lemon leopard lighthouse lion lizard
llama lobster lock locomotive lollipop luggage lungs magnet mammoth mango map maple mask medal melon microphone microscope milk mirror monkey moon moose mosquito
motorcycle mountain mouse mug mushroom necklace nest nut octopus olive onion orange orangutan otter owl ox oyster paintbrush palm pan pancakes panda parachute
parrot peach peacock peanut pear pen pencil penguin pepper phone piano pie pig pillow pin pineapple pizza plane plant plate plug popcorn pot potato pretzel pumpkin
puzzle rabbit raccoon racket radio rainbow ram rat rhinoceros rice ring robot rock rocket rooster rose rugby ruler sailboat salad salt sandal sandwich satellite
saw saxophone scarf scissors scooter scorpion screwdriver seal shark sheep shell shield ship shirt shoe shovel shrimp skateboard skull sled sloth snail snake
sneaker snowflake snowman soap sock spider sponge spoon squid squirrel stapler star steak stethoscope stove strawberry submarine suitcase sun sunflower sunglasses
sushi swan sword syringe taco tape taxi teapot telephone telescope television tent thermometer thread tiger toast toilet tomato tooth tractor train tram tree trophy
truck trumpet tulip turkey turtle umbrella unicorn van vase violin volcano waffle wagon watch watermelon whale wheel wheelchair whistle window wine wolf worm
wrench yarn yogurt zebra""".split()
# The names that get two rows each (in a sentence after a space, in a label after a quotation mark); the others cost two or three tokens.
WITH_ROWS = """airplane anchor apple avocado backpack balloon banana barrel basket battery bear beaver bed bee bell bicycle bird boat book boot bottle bread bridge broccoli
bucket bus butterfly button cactus cake camel camera candle car carrot castle cat chair cheese cherry chicken clock cloud clover coconut compass cookie corn couch cow
crab crocodile crown cup cupcake deer diamond dog dolphin donut door dragon dress drum duck eagle egg eggplant elephant envelope eye feather fire fish flag flamingo
flower fly folder fork fox frog ghost gift giraffe globe goat gorilla grapes guitar hammer hat hedgehog helicopter horse house jar kangaroo key kite kiwi knife koala ladder
ladybug lamp leaf lemon lighthouse lion lizard llama lobster lock magnet mango map mask medal microphone mirror monkey moon mouse mushroom octopus onion orange otter
owl palm panda parrot peach peacock pear pencil penguin phone piano pig pineapple pizza plant potato pumpkin rabbit raccoon radio rainbow ring robot rocket rooster
rose ruler sailboat scissors scorpion shark sheep shell shield shirt shoe shrimp skull sloth snail snake snowflake snowman sock spider spoon squid squirrel star
strawberry sun sunflower swan sword taxi teapot telephone tent tiger tomato tooth tractor train tree trophy truck trumpet turtle umbrella violin watch watermelon
whale wheel whistle wolf wrench zebra""".split()
assert set(WITH_ROWS) <= set(OBJECTS), set(WITH_ROWS) - set(OBJECTS)

# What is said around the names. Every word listed gets a row of its own (with its leading space, if the text has one).
PROMPTS = [
    "system\nYou are a helpful assistant.", "user\nQuestion: Where is the object? Output the coordinates of the key image area in JSON.", "assistant\n",
    "Find the object.", "Locate the object.", "Show me the object.", "Question: What number is on the plate under the object? Output the coordinates of the key image area relevant to the problem in JSON.",
    "Question: What number is written here? Put the final answer in \\boxed{}.", "Here is the enlarged area.", "Question: What is in the area [1,2,3,4]?",
    "List all objects with their boxes in JSON.", "What digit is under the object?", "Read the digits on the plate.", "What does it say?",
    "The choices are listed below:\n(A) 1\n(B) 2\n(C) 3\n(D) 4\n(E) 5\n", "The choices are listed below:\n(A) object\n(B) object\n",
    "You are given one image and one question. First name the coordinates of the key image area relevant to the problem, put them in JSON at the end of your reply and stop. "
    "This triggers cropping and enlarging of the area. Afterwards give the final answer (A, B, C, D, or E) inside \\boxed{}.",
    "Here is the sub-image cropped from the original image. Analyse the original image and the enlarged sub-image step by step. If the sub-image does not suffice, use the original image. "
    "Reason clearly and put the final answer in \\boxed{}.",
    "The coordinates were missing or invalid. The original image is returned.",
    "Picture 1: Which image shows the same object? Image-1 Image-2", "The object is left of the object, right, above, below, behind, between, near, next to it.",
    "How many objects are there? What color is the object? Is there an object in the picture? Yes. No. yes no",
    "Which object is the largest, the smallest, to the left, to the right, at the top, at the bottom? What is the name of the object in the box?",
    "red green blue yellow black white brown gray pink purple one two three four five six seven eight nine ten zero",
    "There is a small object and a big object on it. It has this. I can see that these are not for you. with from by as be was have which when who why how then than into over up down out about more very first second last",
    "Look closely at the photo, zoom in on the text, the sign, the label, the face, the person, the man, the woman, the child, people, water, sky, road, street, building, food, animal, table, wall, room",
    "area\n plate\n number\n answer: The answer is", "object", "objects",
]
LITERAL_WORDS = [" [", " (", " \"", "(A", "(B", "(C", "(D", "(E", ")\n", "],[", "\":", "\",\"", "}.", "}\n", ".\n\n", "?\n\n", ":\n\n", "\n\n", "  ", "    ", "json", "```", "```\n", "bbox"]

# Everyday words for the learned merges only: they shape the pieces that unlisted words fall into.
ENGLISH = """time year people way day man thing woman life child world school state family student group country problem hand part place case week company system
program question work government number night point home water room mother area money story fact month lot right study book eye job word business issue side kind
head house service friend father power hour game line end member law car city community name president team minute idea kid body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher force education standing walking running
sitting holding wearing looking written printed shown colored painted wooden metal plastic paper glass stone large small little long short high low old new young
good great important public able early different same possible bright dark inside outside around through another because against during without before under after
between however something anything everything nothing someone number letter reading visible hidden partially completely probably certainly image picture photograph
corner center middle background foreground position coordinates region detail question answer explain describe identify compare count measure nearest closest""".split()


def byte_table():
    """GPT-2's printable stand-in for each byte: printable ones stand for themselves, the rest start at U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, spare = {b: chr(b) for b in printable}, 256
    for b in range(256):
        if b not in table:
            table[b], spare = chr(spare), spare + 1
    return table

BYTE = byte_table()
visible = lambda text: "".join(BYTE[b] for b in text.encode("utf-8"))


def words_of(text):
    """The word split above, by hand for ASCII prompts (the standard library's re has no \\p{L})."""
    out, i = [], 0
    while i < len(text):
        j = i
        if text[i] == " " and i + 1 < len(text) and text[i + 1].isalpha() or text[i] in "(-[\"" and i + 1 < len(text) and text[i + 1].isalpha():
            j += 1
        if text[j].isalpha():
            while j < len(text) and text[j].isalpha():
                j += 1
            out.append(text[i:j])
            i = j
        else:
            i += 1
    return out


def learn_merges(words, vocabulary, room):
    """Plain BPE: join the most frequent neighbouring pair (ties: alphabetical) until `room` new pieces were made."""
    pieces = {w: list(visible(w)) for w in words}
    merges = []
    while room > 0:
        pairs = Counter()
        for w, count in words.items():
            for pair in zip(pieces[w], pieces[w][1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        joined = best[0] + best[1]
        merges.append(list(best))
        if joined not in vocabulary:
            vocabulary[joined] = len(vocabulary)
            room -= 1
        for p in pieces.values():
            k = 0
            while k + 1 < len(p):
                if (p[k], p[k + 1]) == best:
                    p[k:k + 2] = [joined]
                k += 1
    return merges


def build():
    vocabulary = {}
    def row(piece):
        vocabulary.setdefault(piece, len(vocabulary))
    for b in range(256):
        if not 48 <= b <= 57:
            row(BYTE[b])
    for n in range(1000):
        row(str(n))
    for s in SCAFFOLD + LITERAL_WORDS:
        row(visible(s))
    prompt_words = Counter(w for p in PROMPTS for w in words_of(p))
    for w in sorted(prompt_words):
        row(visible(w))
    room = ROWS - len(SPECIAL) - len(ADDED)
    for n in WITH_ROWS:
        row(visible(" " + n))
        row(visible(n))
    print("rows before the learned merges:", len(vocabulary), "names:", len(WITH_ROWS), "prompt words:", len(prompt_words))
    corpus = Counter()
    for w, c in prompt_words.items():
        corpus[w] += c
    for n in OBJECTS:
        corpus[" " + n] += 3
        corpus[n] += 1
    for w in ENGLISH:
        corpus[" " + w] += 2
        corpus[w.capitalize()] += 1
    merges = learn_merges(corpus, vocabulary, room - len(vocabulary))
    assert len(vocabulary) == room, (len(vocabulary), room)
    return vocabulary, merges


def escape(literal):
    return "".join("\\" + c if c in "\\[]{}()|.*+?^$" else c for c in literal).replace("\n", "\\n")


TEMPLATE = (
    "{%- set images = namespace(n=0) -%}{%- set videos = namespace(n=0) -%}"
    "{%- for message in messages -%}"
    "{%- if loop.first and message['role'] != 'system' -%}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}{%- set images.n = images.n + 1 -%}"
    "{%- if add_vision_id -%}{{ 'Picture ' ~ images.n ~ ': ' }}{%- endif -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'video' or 'video' in part -%}{%- set videos.n = videos.n + 1 -%}"
    "{%- if add_vision_id -%}{{ 'Video ' ~ videos.n ~ ': ' }}{%- endif -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}")


def write(name, value):
    with open(os.path.join(OUT, name), "w", encoding="utf-8", newline="\n") as f:
        json.dump(value, f, ensure_ascii=False, indent=1 if name != "tokenizer.json" else None, separators=None if name != "tokenizer.json" else (",", ":"))
        f.write("\n")


def main():
    os.makedirs(OUT, exist_ok=True)
    vocabulary, merges = build()
    tokens = [(t, len(vocabulary) + i, t in SPECIAL) for i, t in enumerate(SPECIAL + ADDED)]
    ids = {t: i for t, i, _ in tokens}
    added = [dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=s) for t, i, s in tokens]
    pattern = "|".join(escape(s) for s in SCAFFOLD) + "|" + WORD_SPLIT
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    write("tokenizer.json", dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=dict(type="NFC"),
        pre_tokenizer=dict(type="Sequence", pretokenizers=[dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False), byte_level]),
        post_processor=byte_level, decoder=byte_level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False, byte_fallback=False,
                   ignore_merges=True, vocab=vocabulary, merges=merges)))
    write("tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", add_prefix_space=False, bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
        clean_up_tokenization_spaces=False, split_special_tokens=False, model_max_length=4096, processor_class="Qwen2_5_VLProcessor",
        additional_special_tokens=SPECIAL[1:],
        added_tokens_decoder={str(a["id"]): {k: v for k, v in a.items() if k != "id"} for a in added}))
    write("special_tokens_map.json", dict(additional_special_tokens=SPECIAL[1:], eos_token="<|im_end|>", pad_token="<|endoftext|>"))
    write("added_tokens.json", ids)
    with open(os.path.join(OUT, "chat_template.jinja"), "w", encoding="utf-8", newline="\n") as f:
        f.write(TEMPLATE)
    write("preprocessor_config.json", dict(
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor", do_convert_rgb=True, do_resize=True, do_rescale=True, do_normalize=True,
        rescale_factor=1 / 255, resample=3, min_pixels=36 * 784, max_pixels=64 * 784, size=dict(shortest_edge=36 * 784, longest_edge=64 * 784),
        patch_size=14, merge_size=2, temporal_patch_size=2,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711]))
    write("generation_config.json", dict(eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"], do_sample=True, temperature=1.0))
    print("special tokens from", ids["<|endoftext|>"], "to", ids["<|file_sep|>"])


main()
