"""processor.py: what Linux says of the first processor, and what stands in for it elsewhere."""

import platform

import pytest

from peftdebias import processor

TOLD = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC: 9755
flags\t\t: fpu vme

processor\t: 1
vendor_id\t: Other
"""


@pytest.fixture
def told(tmp_path, monkeypatch):
    def tell(text: str | None) -> None:
        file = tmp_path / "cpuinfo"
        if text is not None:
            file.write_text(text)
        monkeypatch.setattr(processor, "FILE", str(file))
        processor.described.cache_clear()

    yield tell
    processor.described.cache_clear()


def test_the_first_processor_is_described(told):
    told(TOLD)
    assert (processor.vendor(), processor.family(), processor.named()) == ("AuthenticAMD", 26, "AMD EPYC: 9755, family 26 model 2")


def test_one_without_a_family(told):
    told("CPU implementer\t: 0x41\nmodel name\t: Neoverse\n")
    assert (processor.vendor(), processor.family(), processor.named()) == ("", None, "Neoverse")


@pytest.mark.parametrize("text", [None, "", "CPU implementer\t: 0x41\n"])
def test_where_linux_gives_no_name_python_does(text, told):
    told(text)
    assert (processor.vendor(), processor.family(), processor.named()) == ("", None, platform.processor() or platform.machine())
