"""Chat templates and tokenizers of several families, made here in the documented format of each."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

QWEN = """
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else -%}
{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] -%}
{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
LLAMA3 = """
{{- bos_token -}}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}
"""
MISTRAL = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Roles must alternate') }}{%- endif -%}
{%- if m.role == 'user' -%}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else -%}{{ ' ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}
"""
GEMMA = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
ZEPHYR = """
{%- for m in messages -%}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}
"""
# Thoughts of earlier turns are left out, and an answer begins with some, which the prompt to answer does not have.
THINKING = """
{%- for m in messages -%}
{%- set said = m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content -%}
{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
MARKED = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ 'A: ' }}{% generation %}{{ m.content + '<end>' }}{% endgeneration %}
{%- else -%}{{ 'Q: ' + m.content + ' ' }}{%- endif -%}
{%- endfor -%}
"""
PLAIN = """
{%- for m in messages -%}{{ m.role + ': ' + m.content + '\n\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}
"""
SPECIALS = {
    "qwen": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["<s>", "</s>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "zephyr": ["</s>"],
    "thinking": ["<|im_start|>", "<|im_end|>"],
    "marked": ["<end>"],
    "plain": ["<end>"],
}
TEMPLATES = dict(zip(SPECIALS, (QWEN, LLAMA3, MISTRAL, GEMMA, ZEPHYR, THINKING, MARKED, PLAIN), strict=True))

ASK = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4."}
AGAIN = [ASK, ANSWER, {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "é6"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def hugging_face(family: str, merges: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte beside the family's own; with merges, words of several bytes too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if merges:
        text = ["user assistant system model 2+2? 4. 3+3? Be brief."] * 9
        made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    special = SPECIALS[family]
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=special[0],
        eos_token=special[-1],
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )
    loaded.chat_template = TEMPLATES[family].strip()
    return loaded


WORDS = "the cat sat on a mat and said: hello, world! 2+2 is 4. é日本🙂 def f(x):\n    return x\n"


def _fast(made: Tokenizer, start: bool) -> PreTrainedTokenizerFast:
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if start:
        before = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
        others = [made.post_processor] if made.post_processor is not None else []
        made.post_processor = processors.Sequence([*others, before])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def _byte_level(trim: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    made.post_processor = processors.ByteLevel(trim_offsets=trim)  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([WORDS] * 5, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return made


MERGES = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat"), ("▁", "▁"), ("a", "▁")]


def _with_bytes() -> Tokenizer:
    """What has no piece is bytes, as SentencePiece has it."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *sorted({*WORDS} - {" ", "\n", "日", "本", "🙂"}),
    ]
    pieces += [left + right for left, right in MERGES]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return Tokenizer(models.BPE(vocabulary, MERGES, byte_fallback=True, unk_token="<unk>", fuse_unk=True))


def _metaspace(scheme: str) -> Tokenizer:
    """As SentencePiece's: blanks are letters."""
    made = _with_bytes()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[arg-type,assignment]
    made.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme, split=False)]  # type: ignore[arg-type]
    )
    return made


def _prepending() -> Tokenizer:
    """As converted tokenizers of Llama 2 are: a blank is put before every text."""
    made = _with_bytes()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    made.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def _word_pieces() -> Tokenizer:
    """As BERT's: blanks are not kept."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    made.decoder = decoders.WordPiece()  # type: ignore[assignment]
    made.train_from_iterator([WORDS] * 5, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"]))
    return made


TOKENIZERS: dict[str, Any] = {
    "byte-level": lambda: _fast(_byte_level(False), start=False),
    "byte-level with a start": lambda: _fast(_byte_level(False), start=True),
    "byte-level, trimmed offsets": lambda: _fast(_byte_level(True), start=True),
    "metaspace, always": lambda: _fast(_metaspace("always"), start=True),
    "metaspace, first": lambda: _fast(_metaspace("first"), start=False),
    "metaspace, never": lambda: _fast(_metaspace("never"), start=True),
    "a blank before all": lambda: _fast(_prepending(), start=True),
    "word pieces": lambda: _fast(_word_pieces(), start=False),
    "without offsets": ByT5Tokenizer,
}
