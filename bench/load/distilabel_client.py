"""distilabel's OpenAILLM without its pipeline: `generate` on a list, which asks for the whole list at once."""

from distilabel.models.llms import OpenAILLM
from measure import SAMPLING, arguments, measured, question

if __name__ == "__main__":
    given = arguments(__doc__)
    batch = int(given.concurrency)
    llm = OpenAILLM(model="bench", base_url=given.url, api_key="none", timeout=600)
    llm.load()
    inputs = [[{"role": "user", "content": question(number)}] for number in range(given.requests)]
    sampling = {"temperature": SAMPLING["temperature"], "top_p": SAMPLING["top_p"]}
    answered = 0
    with measured(given.requests):
        for start in range(0, len(inputs), batch):
            outputs = llm.generate(inputs[start : start + batch], max_new_tokens=SAMPLING["max_tokens"], **sampling)
            answered += sum(output["generations"][0] is not None for output in outputs)
    assert answered == given.requests
