"""On a GPU: the counts of a pytest run and the first line of each failure, out of its JUnit file.

    python -m pytest --junit-xml FILE ...; python benchmarks/gpu/suite.py --name gpu_tests --file FILE
"""

from xml.etree import ElementTree

from qwen import Results, arguments


def main():
    given = arguments(__doc__, name="gpu_tests", file="", what="")
    root = ElementTree.parse(given.file).getroot()
    suite = root if root.tag == "testsuite" else root[0]
    results = Results(given.name)
    counts = {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped", "time")}
    results.add({"what": given.what, **counts})
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                message = (found.get("message") or "")[:300]
                results.add({"test": f"{case.get('classname')}::{case.get('name')}", kind: message})


if __name__ == "__main__":
    main()
