"""A user's mistake is one line that says what was expected, what came and how to repair it.

Exit status 2, no traceback, and nothing on disk that could be taken for a run. The table
goes through the command line's own ``main``; a few rows again through real processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from testing.commands import Ended, call, draw_images, module, run, small_run, torchrun

# What a broken configuration file holds, by its name.
FILES = {
    "typo.toml": "[cut]\nstagse = 2\n",
    "table.toml": "[training]\nlr = 0.1\n",
    "text.toml": '[edges]\nqueue_depth = "2"\n',
    "fraction.toml": "[edges]\nqueue_depth = 2.5\n",
    "number.toml": "[data]\naugment = 1\n",
    "list.toml": "[optimizer]\nmomentum = [0.1]\n",
    "choice.toml": '[cut]\nhead = "1c2g"\n',
    "misplaced.toml": "stages = 2\n",
    "broken.toml": "stages 2\n",
    "binary.toml": "\udcff",
    "broken_model.py": "import no_such_thing_at_all\n",
    "raising_model.py": "raise OSError('the\\ndisk is gone')\n",
    "my_model.py": (
        "def network(image_shape): return []\n"
        "def empty(**_): return []\n"
        "def text(**_): return 'resnet8'\n"
    ),
}

# Options beside those of a small run => what the one line must say, all of it.
OPTIONS = """
    # where to cut
    --stages 6                                => cannot cut 5 layers into 6 stages & choose --stages from 1 to 5
    --balance 2,2,2                           => 2,2,2 sums to 6 & has 5 layers & give sizes that sum to 5
    --balance 2,3                             => 2 sizes for 3 stages & give 3 sizes or choose --stages 2
    --balance 3,0,2                           => 1 layer or more & '0'
    --balance 3,-1,3                          => 1 layer or more & '-1'
    --balance 3,x,1                           => whole numbers such as 2,3,3 & 'x'
    --balance flopps                          => 'flopps' & did you mean 'flops'?
    --balance=                                => unknown --balance '' & flops & 2,3,3
    --balance published                       => published & resnet8
    # unknown words
    --stagse 2                                => --stagse & --stages
    --stages                                  => --stages & requires an argument
    resnet8                                   => resnet8 & unexpected extra argument
    --stages two                              => --stages & valid
    --stages 1.5                              => --stages & valid
    --lr fast                                 => --lr & valid
    --dataset cifar11                         => did you mean 'cifar10
    --head 1c2g                               => unknown --head '1c2g' & did you mean '1c2f'?
    --local-loss cee                          => --local-loss & did you mean 'ce'?
    --guidance-unit steps                     => did you mean 'step'?
    --guidance-period 5 --guidance-reach windows => unknown --guidance-reach 'windows' & did you mean 'window'?
    --guidance-warmup-kind globl              => did you mean 'global'?
    --guided-heads freezing                   => unknown --guided-heads 'freezing' & frozen
    --guided-optimizer seperate               => unknown --guided-optimizer 'seperate' & did you mean 'separate'?
    --head auglocal-0                         => unknown --head 'auglocal-0' & auglocal-D
    --timetable gpip                          => did you mean 'gpipe'?
    --lr-schedule cosin                       => did you mean 'cosine'?
    --transport rcp                           => did you mean 'rpc'?
    --device cudda                            => did you mean 'cuda'?
    --precision fp16                          => unknown --precision 'fp16' & fp32
    --on-nonfinite skp                        => unknown --on-nonfinite 'skp' & did you mean 'skip'?
    --edge-dtype bf8                          => unknown --edge-dtype 'bf8' & did you mean 'fp8'?
    --model resnet9                           => did you mean 'resnet8'? & MODULE:FUNCTION
    # numbers out of range
    --stages 0                                => of at least 1 for --stages, got 0
    --epochs -1                               => of at least 0 for --epochs, got -1
    --steps -5                                => of at least 0 for --steps, got -5
    --lr -0.1                                 => of at least 0 for --lr, got -0.1
    --lr nan                                  => a finite number & for --lr, got nan
    --batch-size 0                            => of at least 1 for --batch-size, got 0
    --seed -1                                 => of at least 0 for --seed, got -1
    --seed 9223372036854775808                => a whole number of at least 0 for --seed
    --microbatches 0                          => of at least 1 for --microbatches, got 0
    --overlap-stages --on-nonfinite skip      => --overlap-stages or --on-nonfinite skip, got both & drop one
    --overlap-stages                          => a CUDA device for --overlap-stages, got cpu & drop it
    --queue-depth 0                           => of at least 1 for --queue-depth, got 0
    --train-limit -1                          => of at least 0 for --train-limit, got -1
    --clip-norm -1                            => of at least 0 for --clip-norm, got -1
    --width -1                                => of at least 0 for --width, got -1
    --guidance-period -1                      => of at least 0 for --guidance-period, got -1
    --guidance-warmup -1                      => of at least 0 for --guidance-warmup, got -1
    --guidance-final -2                       => of at least 0 for --guidance-final, got -2
    --guidance-final -0.5                     => of at least 0 for --guidance-final, got -0.5
    --guidance-final 2.5                      => whole steps, or a share of the run below 1, for --guidance-final, got 2.5
    --guidance-window 0                       => of at least 1 for --guidance-window, got 0
    --guidance-delay -1                       => of at least 0 for --guidance-delay, got -1
    --guidance-delay 0.5                      => --guidance-delay & valid
    --guided-weight -1                        => of at least 0 for --guided-weight, got -1
    --guided-local-weight nan                 => a finite number & for --guided-local-weight, got nan
    --guided-lr-scale -0.5                    => of at least 0 for --guided-lr-scale, got -0.5
    --guided-shrink inf                       => a finite number & for --guided-shrink, got inf
    --local-weight-end -1                     => of at least 0 for --local-weight-end, got -1
    --local-weight-deepest -1                 => of at least 0 for --local-weight-deepest, got -1
    --compare-every -2                        => of at least 0 for --compare-every, got -2
    --final-lr -1                             => of at least 0 for --final-lr, got -1
    # what contradicts something else
    --batch-size 4 --microbatches 8           => --batch-size 4 & --microbatches 8 & lower --microbatches
    --guidance-period 3 --guidance-duration 4 => --guidance-duration from 0 & to the period 3 & got 4 & raise --guidance-period
    --guidance-period 5 --guidance-reach stale --compile => --guidance-reach stale or --compile, got both & drop one
    --guidance-period 5 --guidance-reach stale --memory-budget 9MiB => --guidance-reach stale or --memory-budget, got both & drop one
    --guidance-period 5 --guidance-reach stale --local-microbatches 2 => --guidance-reach stale or --local-microbatches, got both & drop one
    --guidance-period 5 --guidance-reach stale --overlap-stages   => --guidance-reach stale or --overlap-stages, got both & drop one
    --guidance-duration 0 --final-lr 0.1      => a final phase for --final-lr 0.1, got none & drop --final-lr
    --final-lr 0 --final-warmup-epochs 1      => a final phase that begins anew for --final-warmup-epochs & drop the warm-up
    --guidance-period 5 --final-warmup-epochs 1 => a final phase that begins anew for --final-warmup-epochs & drop the warm-up
    --guided-shrink 0.5                       => --guided-shrink 0.5 & got global & drop one
    --guidance-window 3                       => --guidance-reach window or stale-window for --guidance-window 3 & got global & drop one
    --guidance-period 5 --guidance-reach window --guidance-delay 2 => --guidance-reach stale or stale-window for --guidance-delay 2 & got window & drop one
    --guidance-period 5 --guidance-reach window --guided-local-weight 0.5 => --guidance-reach window or stale-window, or --guided-local-weight, got both & drop one
    --guidance-period 5 --guidance-reach window --microbatches 2 --local-loss supcon => --microbatches above 1 & compares the samples & drop one
    --compare-every 3 --microbatches 2 --local-loss supcon => --microbatches above 1, or --compare-every & compares the samples & drop one
    --guidance-duration 2                     => --guidance-period for --guidance-duration 2, got none
    --guidance-warmup 5                       => --guidance-period for --guidance-warmup 5 & drop the warm-up
    --guidance-reach stale                    => --guidance-period & for --guidance-reach stale & drop the reach
    --guidance-duration 0 --microbatches 2    => global or window steps for --microbatches 2, got local ones alone & drop one
    --guidance-duration 0 --recompute         => global or window steps for --recompute, got local ones alone & drop one
    --guidance-period 1 --guided-optimizer reset => local steps beside guided ones for --guided-optimizer reset, got global ones alone
    --guidance-duration 0 --guidance-unit epoch => guided steps for --guidance-unit epoch, got none
    --lr-schedule infopro --epochs 1          => a run of several epochs for --lr-schedule infopro & choose cosine
    --timetable gpipe                         => --microbatches above 1 for --timetable gpipe, got 1 & drop one
    --guidance-warmup-kind global             => a warm-up for --guidance-warmup-kind global & got --guidance-warmup 0 & drop one
    --guidance-duration 0 --guidance-reach stale => --guidance-duration above 0, for --guidance-reach & drop the reach
    --guidance-duration 0 --guidance-final 1 --guidance-reach window => --guidance-duration above 0, for --guidance-reach & drop the reach
    --guidance-duration 0 --guided-optimizer reset => guided steps for --guided-optimizer reset, got none & drop one
    --guidance-duration 0 --guided-lr-scale 2 => guided steps for --guided-lr-scale 2 & drop one
    --guidance-duration 0 --guided-shrink 0.5 => a stale --guidance-reach for --guided-shrink 0.5 & drop one
    --guidance-duration 0 --guided-weight 2   => guided steps for --guided-weight 2 & drop one
    --guidance-duration 0 --guided-local-weight 1 => guided steps for --guided-local-weight 1 & drop one
    --guidance-duration 0 --guided-heads trained => guided steps for --guided-heads trained & drop one
    --refresh-every 5                         => a --head that borrows layers, such as thin-2, for --refresh-every 5, got auto & drop one
    --refresh-every 5 --head auglocal-2       => for --refresh-every 5, got auglocal-2 & drop one
    --guidance-period 5 --guidance-reach stale-window --guidance-delay 0 => a --guidance-delay of at least 1 for --guidance-reach stale-window, got 0
    --infopro-lambdas 1,2,3,4                 => --local-loss infopro & got the true loss & drop one
    --infopro-lambdas 1,2,3                   => four numbers for --infopro-lambdas, such as 5,0.05,0.2,0.5 & '1,2,3'
    --infopro-lambdas 1,2,3,x                 => four numbers for --infopro-lambdas & '1,2,3,x'
    --infopro-lambdas 1,2,3,nan               => four numbers for --infopro-lambdas & none of them below 0
    --infopro-lambdas 1,2,3,-4                => four numbers for --infopro-lambdas & none of them below 0
    --local-loss infopro                      => no weights of infopro were published for resnet8 & --infopro-lambdas
    --model resnet14 --head auglocal-2 --local-loss infopro => no weights of infopro were published & --infopro-lambdas
    --epochs 2 --steps 9                      => got both (2 and 9) & drop one
    --overlap-stages --memory-budget 9MiB     => --overlap-stages & --memory-budget & got both & drop one
    --overlap-stages --local-microbatches 2   => --overlap-stages & --local-microbatches & got both & drop one
    --compile --memory-budget 9MiB            => --compile or --memory-budget, got both & drop one
    --compare-every 3 --compile               => --compare-every or --compile, got both & run backward twice & drop one
    --compare-every 3 --memory-budget 9MiB    => --compare-every or --memory-budget, got both & no room & drop one
    --memory-budget 1e400                     => expected bytes for --memory-budget, such as 300MiB & '1e400'
    --lr-schedule infopro --warmup-epochs 0.5 => whole epochs for --lr-schedule infopro, got --warmup-epochs 0.5
    --momentum 0                              => momentum & add --no-nesterov
    # data
    --data-root {place}/nowhere               => expected a folder of images at {place}/nowhere & check --data-root
    --data-root {place}/empty                 => train/ in {place}/empty & found none & train/<class>/
    --data-root {place}/classless             => {place}/classless/train & <class>/<image>
    --data-root {place}/hollow                => {place}/hollow/test & elk & remove the empty class
    --data-root {place}/corrupt               => {place}/corrupt/train/bee/3.png & cannot be decoded & replace or remove
    --data-root {place}/mixed                 => {place}/mixed/test/cat/2.png is 9x7 & pass --image-size
    --data-root {place}/lopsided              => same classes for training and test & dog
    --image-size 4                            => at least 8x8 & got 4x4
    --dataset cifar10 --data-root {place}/empty => cifar10 & --download
    # where to write
    --run-dir {place}/typo.toml/run           => {place}/typo.toml/run & cannot be written & choose another --run-dir
    --run-dir {place}/finished                => {place}/finished already holds a run & choose another --run-dir
    # configuration files
    --config {place}/no.toml                  => {place}/no.toml & No such file
    --config {place}                          => {place} & Is a directory
    --config {place}/broken.toml              => expected TOML & line 1
    --config {place}/binary.toml              => expected TOML & utf-8
    --config {place}/typo.toml                => unknown key 'stagse' in [cut] & did you mean 'stages'? & {place}/typo.toml
    --config {place}/table.toml               => unknown table 'training'
    --config {place}/misplaced.toml           => the key stages in the table [cut] & move it there
    --config {place}/text.toml                => whole number & '2'
    --config {place}/fraction.toml            => whole number & got 2.5
    --config {place}/number.toml              => True or False for --augment, got 1
    --config {place}/list.toml                => a finite number & [0.1]
    --config {place}/choice.toml              => did you mean '1c2f'?
    # a model of one's own
    --model no_such_module:network            => cannot import 'no_such_module' & PACKAGE.MODULE:FUNCTION
    --model broken_model:network              => cannot import 'broken_model' & no_such_thing_at_all
    --model raising_model:network             => cannot import 'raising_model' & OSError: the disk is gone
    --model my_model:netwrk                   => no function 'netwrk' & did you mean 'network'?
    --model my_model:                         => no function '' & network
    --model my_model:network                  => my_model:network & image_shape, num_classes & change its signature
    --model my_model:text                     => nn.Sequential & got str
    --model my_model:empty                    => at least one layer
"""

# The same for other commands.
COMMANDS = """
    trian                                     => trian & train
    evaluate --run-dir {place}/nowhere        => expected a finished run in {place}/nowhere & no summary.json & --run-dir
    evaluate --run-dir {place}/unfinished     => expected a finished run in {place}/unfinished & pass the --run-dir
    evaluate --run-dir {place}/weightless     => {place}/weightless/model.safetensors & no such file
    evaluate --run-dir {place}/nameless       => {place}/nameless/config.toml & No such file
    evaluate --run-dir {place}/homeless       => expected a folder of images at {place}/nowhere & check --data-root
    evaluate --run-dir {place}/scrambled      => {place}/scrambled/model.safetensors & safetensors form
    evaluate --run-dir {place}/foreign        => do not fit stage 0 & use the model, head and balance
    evaluate                                  => Missing option '--run-dir'
    export --run-dir {place}/nowhere          => expected a finished run in {place}/nowhere
    export --run-dir {place}/scrambled        => {place}/scrambled/model.safetensors & safetensors form
    export --run-dir {place}/finished --output {place}/typo.toml/model.pt => expected & {place}/typo.toml/model.pt
    export --run-dir {place}/finished --output {place}/typo.toml/m.safetensors => expected & {place}/typo.toml/m.safetensors
    export --run-dir {place}/finished --output {place}/no/model.pt => expected & {place}/no/model.pt
    export --run-dir {place}/finished --output {place}/empty => expected & {place}/empty
    plan --dataset imagefolder --data-root {place}/images --devices 0 => 1 worker or more
    plan --dataset imagefolder --data-root {place}/images --devices 3 --stages 2 => 3 workers for 2 stages & raise --stages
    plan --devices 2 --link fast => rate and a delay & 100Mbit,5ms & 'fast'
    plan --devices 2 --link 1Gbit,5 => rate and a delay
    plan --devices 2 --link 1Gbit --memory much => --memory & 300MiB
    plan --devices 2 --link 1Gbit --device-flops 0 => operations per second & 10T
    plan --devices 2 --memory 8GiB => --link & drop
"""


def rows(table: str) -> list[str]:
    """The rows of a table, without its headings."""
    lines = [line.strip() for line in table.splitlines()]
    return [line for line in lines if line and not line.startswith("# ")]


def name_of(row: str) -> str:
    """What pytest calls a row."""
    return row.partition(" => ")[0].strip().replace("{place}/", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that is wrong."""
    place = tmp_path_factory.mktemp("place")
    for name, text in FILES.items():
        (place / name).write_bytes(text.encode(errors="surrogateescape"))
    images = draw_images(place / "images")
    draw_wrong_images(place, images)
    run_dir = place / "finished"
    call("train", *small_run(images), "--run-dir", str(run_dir), cwd=place).check()
    break_runs(place, run_dir)
    return place


def draw_wrong_images(place: Path, images: Path) -> None:
    """Copies of the images, each with one thing wrong."""
    (place / "empty").mkdir()
    (place / "classless" / "train").mkdir(parents=True)
    for name in ("hollow", "corrupt", "mixed", "lopsided"):
        shutil.copytree(images, place / name)
    (place / "hollow" / "test" / "elk").mkdir()
    (place / "corrupt" / "train" / "bee" / "3.png").write_bytes(b"\x89PNG no more")
    Image.new("RGB", (9, 7)).save(place / "mixed" / "test" / "cat" / "2.png")
    shutil.rmtree(place / "lopsided" / "test" / "dog")


def break_runs(place: Path, run_dir: Path) -> None:
    """Copies of a finished run, each with one thing missing or broken."""
    for name in "unfinished weightless nameless scrambled foreign homeless".split():
        shutil.copytree(run_dir, place / name)
    (place / "unfinished" / "summary.json").unlink()
    (place / "weightless" / "model.safetensors").unlink()
    (place / "nameless" / "config.toml").unlink()
    (place / "scrambled" / "model.safetensors").write_bytes(b"scrambled")
    config = (run_dir / "config.toml").read_text()
    for name, old, new in (
        ("foreign", '"resnet8"', '"mlp"'),
        ("homeless", str(place / "images"), str(place / "nowhere")),
    ):
        (place / name / "config.toml").write_text(config.replace(old, new))


@pytest.fixture
def refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Gives the command of a row and checks how it is refused."""
    monkeypatch.syspath_prepend(place)

    def check(row: str) -> None:
        line, _, said = row.format(place=place).partition(" => ")
        ended = call(*line.split(), cwd=tmp_path)
        is_one_line(ended, *said.split(" & "))
        holds_no_run(tmp_path)

    return check


def is_one_line(ended: Ended, *said: str) -> None:
    """Status 2, and one line with all of the words."""
    assert ended.status == 2, ended
    assert ended.err.count("\n") == 1 and ended.err.startswith("pglpipe: error: ")
    assert ended.out == ""
    for words in said:
        assert words in ended.err, words


def holds_no_run(folder: Path) -> None:
    """Nothing in the folder could be taken for a run that has begun or ended."""
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert names <= {"metrics.jsonl"}
    assert all(path.stat().st_size == 0 for path in folder.rglob("metrics.jsonl"))


@pytest.mark.parametrize("row", rows(OPTIONS), ids=name_of)
def test_a_mistake_of_train_is_one_line_and_status_2(
    row: str, place: Path, refused: Callable[[str], None]
) -> None:
    refused(f"train {' '.join(small_run(place / 'images'))} {row}")


@pytest.mark.parametrize("row", rows(COMMANDS), ids=name_of)
def test_a_mistake_of_another_command_is_one_line_and_status_2(
    row: str, refused: Callable[[str], None]
) -> None:
    refused(row)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_not_there_is_one_line_and_status_2(
    place: Path, refused: Callable[[str], None]
) -> None:
    options = " ".join(small_run(place / "images"))
    refused(f"train {options} --device cuda => --device cuda & use --device cpu")


def test_the_command_that_was_refused_works_once_it_is_repaired(
    place: Path, tmp_path: Path
) -> None:
    options = [*small_run(place / "images"), "--run-dir", "run"]
    is_one_line(call("train", *options, "--balance", "2,2,2", cwd=tmp_path), "sums")
    call("train", *options, "--balance", "2,2,1", cwd=tmp_path).check()
    assert (tmp_path / "run" / "summary.json").exists()


# -- the same in processes of their own -----------------------------------------------


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_worker_0_speaks_for_all(
    rank: str, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = call("train", "--epochs", "1", "--steps", "1", cwd=tmp_path)
    assert ended.status == 2 and len(ended.said) == lines


@pytest.mark.dist
@pytest.mark.parametrize(
    "command",
    [
        module("pglpipe", "train", "--stagse", "2"),
        pytest.param(
            module("pglpipe.train", "--epochs", "1", "--steps", "1"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["usage", "configuration"],
)
def test_a_process_ends_with_status_2(command: list[str], tmp_path: Path) -> None:
    is_one_line(run(command, cwd=tmp_path))
    holds_no_run(tmp_path)


@pytest.mark.dist
@pytest.mark.slow  # a torchrun each
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--stages 1", "2 workers for 1 stages"),
        ("--stagse 2", "--stagse"),
        ("--epochs 2 --steps 9", "got both"),
        ("--data-root nowhere", "nowhere"),
        ("--balance 9,9,9", "sums to 27"),
        ("--model no_such:thing", "no_such"),
    ],
)
def test_a_mistake_is_told_once_by_all_workers_together(
    options: str, said: str, place: Path, tmp_path: Path
) -> None:
    words = [*small_run(place / "images"), *options.split()]
    ended = run(torchrun(2, "-m", "pglpipe.train", *words), cwd=tmp_path)
    (line,) = ended.said
    assert line.startswith("pglpipe: error: ") and said in line
    assert ended.status != 0
    holds_no_run(tmp_path)
