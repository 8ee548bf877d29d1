"""Writes tokenizers with chat templates, and what Transformers makes of chats.

  python chat_program.py TEMPLATES OUT

TEMPLATES is a JSON object of templates by name. OUT/NAME gets the tokenizer as
Transformers saves it, and chats.json: of each conversation the text, the tokens
and, for templates that mark what is generated, which are the assistant's.
"""

import json
import pathlib
import sys

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SYSTEM = {"role": "system", "content": "Be brief: \"<b>\" 'é'."}
CHATS = [
  [("user", "What is 2 + 2?"), ("assistant", "It is 4.")],
  [
    *(("user", "  Hello, 世界!\n"), ("assistant", "Hello.\n\nAnd so on ")),
    *(("user", "Why?"), ("assistant", "because\n\tof <this>")),
  ],
  [("user", "a"), ("assistant", "b"), ("user", "c")],
]


def make_tokenizer():
  library = tokenizers.Tokenizer(models.BPE())
  library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  library.decoder = decoders.ByteLevel()
  texts = [content for chat in CHATS for _, content in chat]
  library.train_from_iterator(
    texts * 9,
    trainers.BpeTrainer(
      vocab_size=320,
      special_tokens=SPECIAL,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=library, bos_token="<s>", eos_token="</s>"
  )


def main(templates, out):
  for name, template in json.loads(pathlib.Path(templates).read_text()).items():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    folder = pathlib.Path(out, name)
    tokenizer.save_pretrained(folder)
    found = []
    for chat in CHATS:
      messages = [{"role": role, "content": text} for role, text in chat]
      messages = [SYSTEM, *messages]
      tokens = tokenizer.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask="endgeneration" in template,
      )
      found.append(
        {
          "messages": messages,
          "text": tokenizer.apply_chat_template(messages, tokenize=False),
          "ids": tokens["input_ids"],
          "mask": tokens.get("assistant_masks"),
        }
      )
    (folder / "chats.json").write_text(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
