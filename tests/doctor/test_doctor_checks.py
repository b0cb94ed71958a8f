"""What the doctor says about versions, processors, cores, memory, caches and ports."""

import socket
from pathlib import Path

import pytest

from longforge.doctor.check import Check, as_document, as_lines, healthy
from longforge.doctor.house import check_kernel_cache, check_port, check_program, kernel_folders
from longforge.doctor.machine import (
    available_memory,
    check_cores,
    check_memory,
    check_package,
    check_processor,
    check_python,
    supported_range,
    within,
)
from longforge.server.cores import Cores
from small_model import small_config


@pytest.mark.parametrize(
    ("version", "supported", "met"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14", ">=2.11,<2.14", False),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9.1", ">=2.11,<2.14", False),
        ("2.11", ">=2.11.0", True),
        ("3.7.1", "==3.7.1", True),
        ("3.7.10", "==3.7.1", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_number_by_number(version: str, supported: str, met: bool):
    assert within(version, supported) is met


def test_ranges_come_from_the_packages_own_metadata():
    listed = ["torch<2.14,>=2.11", "torchmetrics>=9", "triton==3.7.1; extra == 'dev'", "rich"]
    assert supported_range("torch", listed) == ">=2.11,<2.14"
    assert supported_range("triton", listed) == "==3.7.1"
    assert supported_range("rich", listed) == supported_range("absent", listed) == ""
    assert within("2.11.0", supported_range("torch"))


def test_a_missing_or_unsupported_package_fails_with_the_command_that_mends_it():
    assert check_package("numba", "0.61.2", ">=0.61").status == "ok"
    for version in (None, "0.60"):
        check = check_package("numba", version, ">=0.61")
        assert (check.status, check.fix) == ("fail", "pip install 'numba>=0.61'")
    assert check_python("3.10.4").status == check_python("3.14.0").status == "fail"
    assert check_python("3.12.1").status == "ok"


def test_processor_features_are_those_that_linux_lists():
    cpuinfo = "processor : 0\nflags\t\t: fpu avx2 avx512_bf16 avx512_vnni\nbugs : amx_bf16\n"
    check = check_processor(cpuinfo, "avx512")
    assert (check.status, check.found) == ("ok", "AVX512-BF16, VNNI, AVX2; bf16 runs on avx512")
    assert check_processor("flags : avx2\n", None).status == "warn"
    assert "no vector features" in check_processor("", None).found


def test_cores_that_others_use_are_a_warning():
    assert check_cores(Cores(machine=4, allowed=4, quota=None, busy=0.0)).status == "ok"
    assert check_cores(Cores(machine=4, allowed=4, quota=None, busy=3.0)).status == "warn"


def test_memory_counts_weights_first_and_then_pages():
    config = small_config(max_positions=96)
    plenty = check_memory(2**30, config)
    assert plenty.status == "ok" and "1.0 GiB available" in plenty.found
    assert check_memory(1000, config).status == "fail"
    tokens = [int(check_memory(n, config).found.split()[-2].replace(",", "")) for n in (2**24, 2**25)]
    assert 0 < tokens[0] < tokens[1] / 1.9


def test_available_memory_is_read_in_bytes(tmp_path: Path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert available_memory(tmp_path / "meminfo") == 2**21
    assert available_memory(tmp_path / "absent") is None


def test_a_kernel_cache_is_cold_warm_or_not_to_be_written(tmp_path: Path):
    folders = [tmp_path / "cache" / "abc" / name for name in ("one", "two")]
    cold = check_kernel_cache(folders)
    assert cold.status == "warn" and "0 of 2" in cold.found and cold.fix == "longforge doctor --compile"
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "kernel.1.nbc").touch()
    assert check_kernel_cache(folders).status == "ok"
    (tmp_path / "file").touch()
    unwritable = check_kernel_cache([tmp_path / "file" / "cache" / "abc" / "one"])
    assert unwritable.status == "warn" and "cannot be written" in unwritable.found


def test_the_cache_that_is_looked_at_is_the_kernels_own():
    folders = kernel_folders()
    assert len(folders) >= 4
    assert any("sparse_attention" in folder.name for folder in folders)


def test_a_port_in_use_is_a_warning_with_another_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check = check_port(port)
        assert check.status == "warn" and "in use" in check.found and "--port 0" in check.fix
    assert check_port(port).status == "ok"


def test_a_program_that_only_tests_need_never_fails():
    assert check_program("Chromium", "/usr/bin/chromium", "x").status == "ok"
    assert check_program("Chromium", None, "install it").fix == "install it"
    assert check_program("Chromium", None, "install it").status == "warn"


def test_checks_are_lines_for_people_and_one_document_for_programs():
    checks = [Check("a", "ok", "fine"), Check("long name", "warn", "slow", "wait")]
    assert as_lines(checks) == "ok    a          fine\nwarn  long name  slow\n                 fix: wait"
    assert healthy(checks) and as_document(checks)["healthy"] is True
    assert as_document(checks)["checks"][1] == {
        "name": "long name",
        "status": "warn",
        "found": "slow",
        "fix": "wait",
    }
    assert not healthy([*checks, Check("b", "fail", "broken", "mend")])
