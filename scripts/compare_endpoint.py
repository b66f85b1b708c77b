#!/usr/bin/env python
"""Greedy texts of an endpoint that serves a model beside those that bmjax generates from the same directory.

    vllm serve runs/demo/merged/hf --dtype float32 --port 8001     # or any other server of OpenAI's API
    scripts/compare_endpoint.py runs/demo/merged/hf http://127.0.0.1:8001/v1 runs/demo/data/*/test.jsonl

Asks the first --count prompts, file by file in turn, as chats. Prints every pair of texts that differ; then the exit
code is 1.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator

import httpx

import bmjax
from bmjax.io.rows import read_rows


def main() -> int:
    """Compare and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory")
    parser.add_argument("base_url", help="of the endpoint that serves it, with /v1")
    parser.add_argument("questions", nargs="+", help="files of rows with a prompt")
    parser.add_argument("--count", type=int, default=20, help="how many prompts")
    parser.add_argument("--max-tokens", type=int, default=72, help="of an answer")
    options = parser.parse_args()
    prompts = list(itertools.islice(in_turn(options.questions), options.count))
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    own = bmjax.generate(bmjax.load(options.model), chats, max_new_tokens=options.max_tokens)
    try:
        with httpx.Client(base_url=options.base_url.rstrip("/") + "/", timeout=600) as client:
            (name,) = (entry["id"] for entry in client.get("models").raise_for_status().json()["data"])
            request = {"model": name, "temperature": 0, "max_tokens": options.max_tokens}
            replies = [client.post("chat/completions", json=request | {"messages": chat}) for chat in chats]
        served = [reply.raise_for_status().json()["choices"][0]["message"] for reply in replies]
    except httpx.HTTPError as error:
        print(f"{options.base_url}: {error}; is the server up, and does the URL end in /v1?", file=sys.stderr)
        return 2
    equal = 0
    for prompt, text, message in zip(prompts, own, served, strict=True):
        # A server that splits the reasoning off leaves the text after it.
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        expected = text.partition("</think>")[2].strip() if reasoning else text
        if (message["content"] or "").strip() == expected.strip():
            equal += 1
        else:
            print(f"{prompt!r}\n  bmjax:    {text!r}\n  endpoint: {message['content']!r}")
    print(f"{equal} of {len(prompts)} greedy texts of {name} are equal")
    return 0 if equal == len(prompts) else 1


def in_turn(files: list[str]) -> Iterator[str]:
    """Yield the files' prompts: the first of each, then the second of each."""
    columns = [[row["prompt"] for _, row in read_rows(file)] for file in files]
    for prompts in itertools.zip_longest(*columns):
        yield from (prompt for prompt in prompts if prompt is not None)


if __name__ == "__main__":
    sys.exit(main())
