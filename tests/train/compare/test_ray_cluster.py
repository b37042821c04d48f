"""A compare on a Ray cluster of two nodes on this machine."""

import importlib.util
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.cluster_utils import Cluster

from trimtab.errors import RunFolderError
from trimtab.train.compare import Failure, compare, ray_cluster
from trimtab.train.hardware import Hardware
from trimtab.train.progress import Result

pytestmark = [
    pytest.mark.slow,
    # Ray's own: files and sockets that it leaves to the garbage collector, and what it will change one day
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

CPU = Hardware(accelerator="cpu")


@pytest.fixture(scope="module")
def lines() -> Any:
    """The recipe of the other tests, from their file."""
    path = Path(__file__).with_name("test_compare.py")
    spec = importlib.util.spec_from_file_location("lines_for_ray", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["lines_for_ray"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def test_a_grid_on_two_nodes_gives_the_numbers_of_one_machine(tmp_path: Path, cluster: Cluster, lines: Any) -> None:
    arms = {"a": lines.Line(), "b": lines.Line(clip=1.0, raises_at=0.2)}
    heard: dict[str, Any] = {}
    grid = ([0.1, 0.2], [0, 1])
    folder = tmp_path / "ray"
    places = compare(
        arms, *grid, folder, ray_address=cluster.address, on_news=lambda *news: heard.update([news]), hardware=CPU
    )
    compare(arms, *grid, tmp_path / "here", jobs=2, hardware=CPU)
    assert set(heard) == {place.name for place in places}
    for place in places:
        if place.arm == "b" and place.recipe.lr == 0.2:
            assert isinstance(heard[place.name], Failure)
            assert json.loads((place.folder / "error.json").read_text())["kind"] == "ZeroDivisionError"
            continue
        other = tmp_path / "here" / place.folder.relative_to(folder)
        assert isinstance(heard[place.name], Result)
        assert lines.log(place.folder) == lines.log(other)
    assert not list(folder.glob(".probe*"))


def test_a_node_that_dies_loses_its_run_only(tmp_path: Path, cluster: Cluster, lines: Any) -> None:
    (tmp_path / "hold").touch()
    arms = {"a": lines.Line(trace=str(tmp_path))}
    grid = ([0.1, 0.2, 0.4], [0])
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    heard: dict[str, Any] = {}

    def hear(name: str, news: Any) -> None:
        heard[name] = news

    def kill_a_node_at_work() -> None:
        while len(list(tmp_path.glob("none *"))) < 3:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
        patience = time.monotonic() + 90  # Ray's own workers outlive their node for a moment, and could still finish
        while not any(isinstance(news, Failure) for news in heard.values()) and time.monotonic() < patience:
            time.sleep(0.05)
        (tmp_path / "hold").unlink()

    killer = threading.Thread(target=kill_a_node_at_work, daemon=True)
    killer.start()
    places = compare(arms, *grid, tmp_path / "c", ray_address=cluster.address, on_news=hear, hardware=CPU)
    killer.join(60)
    dead = [place for place in places if isinstance(heard[place.name], Failure)]
    assert len(dead) == 1
    assert heard[dead[0].name].kind == "WorkerDied"
    assert (dead[0].folder / "error.json").is_file()
    compare(arms, *grid, tmp_path / "c", ray_address=cluster.address, on_news=hear, hardware=CPU)
    assert all(isinstance(heard[place.name], Result) for place in places)
    assert not (dead[0].folder / "error.json").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_cluster_that_is_not_there(tmp_path: Path, lines: Any, address: str) -> None:
    with pytest.raises(RunFolderError, match=f"there is no Ray cluster at '{address}'"):
        compare({"a": lines.Line()}, [0.1], [0], tmp_path / "c", ray_address=address, hardware=CPU)


def test_a_folder_that_nodes_do_not_share(
    tmp_path: Path, cluster: Cluster, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(address: str) -> None:
        compare({"a": lines.Line()}, [0.1], [0], tmp_path / "c", ray_address=address, hardware=CPU)

    monkeypatch.setattr(ray_cluster, "_write_probe", lambda path: None)
    with pytest.raises(RunFolderError, match="what it wrote there is not seen here"):
        run(cluster.address)
    monkeypatch.setattr(ray_cluster, "_write_probe", lambda path: "No such file or directory")
    with pytest.raises(RunFolderError, match=r"does not share .*: No such file or directory\. Choose a folder"):
        run(cluster.address)
    assert not list(tmp_path.glob("c/runs/**/run.json"))
