"""The table of the data sets. Who publishes a set, under which licence, and the checksum of each of its files.

Where the owners publish the very files at an address of their own, they are fetched from there, pinned to a commit. The
others are read from a folder that `TRIMTAB_DATA` names.
"""

from trimtab.errors import DataError
from trimtab.tasks.data.data_set import DataFile, DataSet
from trimtab.tasks.data.image_sets import IMAGE_SETS
from trimtab.words import nearest

_ETT = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/1d16c8f4f943005d613b5bc962e9eeb06058cf07/ETT-small"
_MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw"
_CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"


def _multi30k(name: str, size: int, sha256: str) -> DataFile:
    return DataFile(f"multi30k/{name}", size, sha256, f"{_MULTI30K}/{name}")


def _ett(name: str, contents: str, size: int, sha256: str) -> DataSet:
    file = DataFile(f"timeseries/{name}.csv.gz", size, sha256, f"{_ETT}/{name}.csv", packed=True)
    return DataSet(name, "forecasting", contents, "CC BY-ND 4.0", "github.com/zhouhaoyi/ETDataset", (file,))


_ALL = (
    *IMAGE_SETS,
    _ett(
        "ETTh1",
        "17,420 hours × 7 of a transformer's load",
        2_589_657,
        "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    ),
    _ett(
        "ETTh2",
        "17,420 hours × 7 of a transformer's load",
        2_417_960,
        "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
    ),
    _ett(
        "ETTm1",
        "69,680 quarters of an hour × 7 of a transformer's load",
        10_360_719,
        "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
    ),
    _ett(
        "ETTm2",
        "69,680 quarters of an hour × 7 of a transformer's load",
        9_677_236,
        "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",
    ),
    DataSet(
        "exchange-rate",
        "forecasting",
        "7,588 days × 8 exchange rates",
        "none stated",
        "github.com/laiguokun/multivariate-time-series-data",
        (
            DataFile(
                "timeseries/exchange_rate.txt.gz",
                174_647,
                "934e8b7899169426f6b2f8052f8cc7d61e9c91fef75176b684fde03560ed0540",
            ),
        ),
    ),
    DataSet(
        "weather",
        "forecasting",
        "52,696 times 10 minutes × 21 values of the weather in Jena",
        "none stated",
        "Max Planck Institute for Biogeochemistry",
        (
            DataFile(
                "timeseries/weather.csv.gz",
                2_275_774,
                "e659cd0f7e9bde45adb03b9754dcdb56189e7a735fdb10c4e9542dfa6ab81355",
            ),
        ),
    ),
    DataSet(
        "national-illness",
        "forecasting",
        "966 weeks × 7 counts of influenza-like illness",
        "none stated",
        "US CDC",
        (
            DataFile(
                "timeseries/national_illness.csv.gz",
                25_589,
                "25a5247c8d6ad2772c1b617d5117ad6d6187a1cffa389bcb7f7b9b79143f0a86",
            ),
        ),
    ),
    DataSet(
        "multi30k",
        "translation",
        "29,000 + 1,014 + 2,000 English-German sentence pairs",
        "none stated; non-commercial research",
        "github.com/multi30k/dataset",
        (
            _multi30k("train.en.gz", 568_929, "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"),
            _multi30k("train.de.gz", 637_044, "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"),
            _multi30k("val.en.gz", 21_650, "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"),
            _multi30k("val.de.gz", 24_681, "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a"),
            _multi30k(
                "test_2016_flickr.en.gz", 21_077, "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"
            ),
            _multi30k(
                "test_2016_flickr.de.gz", 22_890, "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8"
            ),
            _multi30k(
                "test_2017_flickr.en.gz", 19_138, "76a444ee25172e72695cddb13ae4a3bda59430617be88e0bb46b60504f054074"
            ),
            _multi30k(
                "test_2017_flickr.de.gz", 21_471, "a2c89666db00c495cd8513b9d708d5a3acc205d7de312ef2bf5fb7ebc1540aee"
            ),
        ),
    ),
    DataSet(
        "tatoeba-deu-eng",
        "translation",
        "169,197 English-German sentence pairs",
        "CC BY 2.0",
        "tatoeba.org, prepared by www.manythings.org/anki",
        (
            DataFile(
                "tatoeba-deu-eng/deu.txt.gz",
                3_985_627,
                "e936e777ff76f3b5df26630035bcb05b8e5b0959f52d8fea7797ae154df51aa0",
            ),
            DataFile(
                "tatoeba-deu-eng/_about.txt",
                1_441,
                "3bf2fb9d1ee5082aa4888a06056113f6ff4c20131ed7e91eee437f3e90514197",
            ),
        ),
    ),
    DataSet(
        "wikitext-2",
        "language",
        "2,088,628 + 217,646 + 245,569 words of Wikipedia",
        "CC BY-SA",
        "Merity et al., 2016",
        (
            DataFile(
                "wikitext-2/train.txt.gz",
                3_677_142,
                "fc9790d81cb8f08d3cfc5765fc8e67dcf8fe00845c1365914b81da130bbd79ce",
            ),
            DataFile(
                "wikitext-2/valid.txt.gz",
                373_475,
                "3cdd8cb5bb349a05840c7c3bef9578d90d64df77e27e0c25c033ba9342757ee3",
            ),
            DataFile(
                "wikitext-2/test.txt.gz",
                410_944,
                "688887879b4b526692cb2e423a516dcc5f6584a01fd3f33a8e164fbed2de8090",
            ),
        ),
    ),
    DataSet(
        "tinyshakespeare",
        "language",
        "1,115,394 characters of Shakespeare",
        "MIT; the text is in the public domain",
        "github.com/karpathy/char-rnn",
        (
            DataFile(
                "tinyshakespeare/input.txt.gz",
                1_115_394,
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                f"{_CHAR_RNN}/data/tinyshakespeare/input.txt",
                packed=True,
            ),
        ),
    ),
    DataSet(
        "an4",
        "speech",
        "948 + 130 utterances as features, 40 as audio, 16 kHz",
        "CMU: free for any use, keep the notice",
        "Carnegie Mellon University",
        (
            DataFile(
                "an4/an4_mfcc.npz.xz",
                12_463_344,
                "c14914d6b0847f8ae7f24d3593ff130012334df8bca080481d76bfd206de0cdf",
            ),
            DataFile(
                "an4/an4_wav40.npz.xz",
                554_440,
                "a84cd553f3fc7d82aac048aae5a553ee38dc8357d33e98c45a03f7232a61f01a",
            ),
            DataFile("an4/an4.dic", 4_145, "fc9bdde3129339f4cb7c0f8938e2dc569b640155cad994c8aab032b25fcccd5d"),
            DataFile("an4/LICENSE", 1_914, "065196b947a2a8b9b351e4d06d9f582955150e4c628ef0b48ea10488a28d8e57"),
        ),
    ),
    DataSet(
        "fsdd",
        "speech",
        "3,000 spoken digits, 8 kHz",
        "CC BY-SA 4.0",
        "github.com/Jakobovski/free-spoken-digit-dataset",
        (
            DataFile(
                "fsdd/fsdd.npz.xz",
                12_518_904,
                "5d81134652fecd6ec50e1b74f062be9e2aa19fad7cfe8a6f6f229b7e0d5cc397",
            ),
        ),
    ),
    DataSet(
        "yesno",
        "speech",
        "60 recordings of 8 words, 8 kHz",
        "none stated",
        "an anonymous contributor to Kaldi",
        (
            DataFile(
                "yesno/yesno.npz.xz",
                3_566_904,
                "c82bfb650f6b241e6e7177b48c65f06fb9911a2b6c17876e318dc615781d41b1",
            ),
            DataFile(
                "yesno/README.source.txt",
                833,
                "1b249d06fb95eeda426cd0112335189b99cbada8c04e47fd9f8ed12aa621fc7c",
            ),
        ),
    ),
    DataSet(
        "speech-commands-mini",
        "speech",
        "300 recordings of 30 words, 16 kHz",
        "CC BY 4.0",
        "P. Warden, Google, 2017",
        (
            DataFile(
                "speech-commands-mini/speech_commands_300.npz.xz",
                5_234_304,
                "801222d621ca878ab47e7884b72a240daca8b688d9011c794d0741a9863beea2",
            ),
        ),
    ),
    DataSet(
        "librivox-mini",
        "speech",
        "10 utterances, 16 kHz",
        "BSD-2-Clause",
        "github.com/cmusphinx/pocketsphinx",
        (
            DataFile(
                "librivox-mini/librivox_cards_10.npz.xz",
                725_468,
                "3cc27f71388af62736ea7f7eb39e8861c2bb54e5ca4e16ff3c20361056706ed8",
            ),
        ),
    ),
)

DATA_SETS: dict[str, DataSet] = {each.name: each for each in _ALL}
"""Every data set that is read from the data folder, by name."""


_ELSEWHERE = {
    **{
        name: f"has no address here: put its file into the data folder as timeseries/{name}.csv or .csv.gz"
        for name in ("electricity", "traffic")
    },
    "digits": "is in the package: there is nothing to get or check",
    "fake-imagenet": "is made up as it is needed: there is nothing to get or check",
    "imagenet": "is given out by image-net.org only, after you agree to its terms: put its images into the data folder "
    "as imagenet/train/CLASS/ and imagenet/val/CLASS/",
}


def find_data_set(name: str) -> DataSet:
    """The data set of that name.

    Raises:
        DataError: there is none.
    """
    if name in _ELSEWHERE:
        raise DataError(f"{name} {_ELSEWHERE[name]}")
    if name not in DATA_SETS:
        lower = {known.lower(): known for known in DATA_SETS}
        near = lower.get(name.lower())
        hint = f" Did you mean {near}?" if near else nearest(name, DATA_SETS)
        raise DataError(f"unknown data set {name!r}.{hint} There are: {', '.join(DATA_SETS)}")
    return DATA_SETS[name]
