"""Runs the tests of a folder, or those whose name holds a word, and prints their results as Rust's tests do: python run.py FOLDER [WORD]"""

import sys
import traceback
import unittest


class Result(unittest.TestResult):
    def __init__(self):
        super().__init__()
        self.passed, self.texts = 0, []

    def startTest(self, test):
        super().startTest(test)
        print(f"test {test.id()} ... ", end="", flush=True)

    def addSuccess(self, test):
        self.passed += 1
        print("ok", flush=True)

    def fail(self, test, error):
        if not isinstance(test, unittest.TestCase):
            # What a class needs before its tests failed.
            print(f"test {test.id()} ... ", end="")
        print("FAILED", flush=True)
        self.texts.append(f"---- {test.id()}\n" + "".join(traceback.format_exception(*error)))

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.fail(test, error)

    def addError(self, test, error):
        super().addError(test, error)
        self.fail(test, error)


def main():
    folder, *words = sys.argv[1:]
    loader = unittest.TestLoader()
    loader.testNamePatterns = [f"*{word}*" for word in words] or None
    suite = loader.discover(folder)
    result = Result()
    suite.run(result)
    if result.texts:
        print("\nfailures:\n")
        print("\n".join(result.texts))
    state = "FAILED" if result.texts else "ok"
    print(f"test result: {state}. {result.passed} passed; {len(result.texts)} failed")
    sys.exit(1 if result.texts or (result.passed == 0 and not words) else 0)


main()
