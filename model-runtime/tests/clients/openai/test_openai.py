"""OpenAI's client, as it comes from PyPI."""

import json
import unittest

import openai
from serving import MODELS, serving, start

EXPECTED = json.loads((MODELS / "sentences/expected.json").read_text())
# The last one has more tokens than the model takes.
TEXTS = EXPECTED["texts"][:4]


class OpenAi(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        server = start(cls, "sentences/sentences", "--engine", "tract")
        cls.client = openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0)
        cls.addClassCleanup(cls.client.close)

    def assert_close(self, found, expected):
        self.assertEqual(len(found), len(expected))
        for one, other in zip(found, expected):
            self.assertAlmostEqual(one, other, delta=1e-5)

    def test_models(self):
        self.assertEqual([model.id for model in self.client.models.list()], ["sentences"])
        self.assertEqual(self.client.models.retrieve("sentences").object, "model")

    def test_embeddings_of_texts(self):
        # The client asks for base64 and decodes it unless it is told what to ask for.
        for options in [{}, {"encoding_format": "float"}]:
            answer = self.client.embeddings.create(model="sentences", input=TEXTS, extra_body={"truncate": True}, **options)
            self.assertEqual([one.index for one in answer.data], [0, 1, 2, 3])
            for one, expected in zip(answer.data, EXPECTED["sentence_embedding"]):
                self.assert_close(one.embedding, expected)
            tokens = sum(map(sum, EXPECTED["attention_mask"][:4]))
            self.assertEqual((answer.usage.prompt_tokens, answer.usage.total_tokens), (tokens, tokens))

    def test_one_text_and_tokens(self):
        tokens = [token for token in EXPECTED["input_ids"][0] if token != 0]
        for given in [TEXTS[0], tokens, [tokens]]:
            answer = self.client.embeddings.create(model="sentences", input=given)
            self.assert_close(answer.data[0].embedding, EXPECTED["sentence_embedding"][0])

    def test_refusals(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            self.client.embeddings.create(model="another", input="a")
        self.assertEqual((caught.exception.code, caught.exception.param), ("model_not_found", "model"))
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.embeddings.create(model="sentences", input="the " * 100)
        self.assertEqual(caught.exception.param, "input")
        self.assertIn("12 tokens", caught.exception.message)

    def test_a_model_without_embeddings(self):
        with serving("pictures/pictures", "--engine", "tract") as server:
            with openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0) as client:
                self.assertEqual(list(client.models.list()), [])
                with self.assertRaises(openai.BadRequestError) as caught:
                    client.embeddings.create(model="pictures", input="a")
        self.assertIn("tokenizer.json", caught.exception.message)
