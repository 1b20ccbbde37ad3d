"""The benchmark table is the CSV, and no figure in it is made up."""

import re

import pytest
import torch

from fewstep.kernels.bench import attention, record, table


def test_the_readme_table_is_generated_from_the_csv():
    text = table.README.read_text()
    assert table.render(text, record.read()) == text
    assert len(record.read()) > 20
    with pytest.raises(ValueError, match="markers"):
        table.render("no markers", [])


def test_measured_rows_say_where_and_the_rest_say_unmeasured():
    for row in record.read():
        if row.value == record.UNMEASURED:
            assert (row.hardware, row.commit, row.date) == ("", "", "")
            continue
        assert float(row.value) > 0
        assert all((row.hardware, row.torch, row.triton, row.commit, row.date))
        assert row.detail
        if row.case.startswith("cuda"):
            assert row.driver


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured")
def test_without_a_gpu_no_gpu_row_has_a_value():
    rows = list(attention.gpu(1))
    assert len(rows) >= 20
    assert {row.value for row in rows} == {record.UNMEASURED}


def test_new_rows_replace_old_ones_but_unmeasured_never_hides_a_figure(tmp_path):
    path = tmp_path / "rows.csv"
    old = record.Row("a", "b", "c", "1.5", hardware="x")
    record.write([old, record.Row("a", "b", "d", record.UNMEASURED)], path)
    record.write([record.Row("a", "b", "c", record.UNMEASURED), record.Row("a", "b", "d", "2", detail="x, y")], path)
    assert record.read(path) == [old, record.Row("a", "b", "d", "2", detail="x, y")]


def test_the_environment_names_versions_and_processor():
    env = record.environment("cpu")
    assert env["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", env["date"])
    assert env["hardware"]
    assert env["threads"] == str(torch.get_num_threads())
