"""stdout and stderr take everything, and nothing that happens to them ends the work."""

import io
import os
import sys

import pytest

from autoreg_vit.engine.console import patient_streams, printable
from autoreg_vit.engine.progress import progress_bar, say
from tests.support.bare import run_bare


@pytest.mark.parametrize('encoding, shown', [
    ('ascii', r'caf\xe9 \u65e5 \udcff'), ('latin-1', r'café \u65e5 \udcff'), ('utf-8', r'café 日 \udcff')])
def test_letters_that_a_stream_lacks_are_escaped(encoding: str, shown: str, monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setattr(sys, 'stderr', err)
    with patient_streams():
        print('café 日 \udcff')
        print('café 日 \udcff', file=sys.stderr)
    assert sys.stdout is out and sys.stderr is err
    for stream in (out, err):
        assert stream.buffer.getvalue().decode(encoding).strip() == shown
    assert printable('café 日 \udcff', encoding) == shown


def test_streams_that_are_none_or_closed(monkeypatch):
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, 'stdout', stream)
        monkeypatch.setattr(sys, 'stderr', stream)
        say('to nobody')  # also from Python, without a command around it
        with patient_streams():
            print('to nobody')
            say('to nobody')
            assert list(progress_bar(range(3))) == [0, 1, 2]


SCRIPT = '''
import sys
from autoreg_vit.engine.console import patient_streams
from autoreg_vit.engine.progress import progress_bar, say
from tests.support.bare import run_bare
with patient_streams():
    for number in progress_bar(range(2000)):
        say(f'line {number} ' + 'x' * 200)
    open(sys.argv[1], 'w').write('done')
'''


def test_a_reader_who_leaves(tmp_path):
    pytest.importorskip('sklearn')
    from tests.support.launching import python, server

    pipes = [tmp_path / name for name in ('out', 'err')]
    for pipe in pipes:
        os.mkfifo(pipe)
    process = server().Process(target=python, args=(('-c', SCRIPT, str(tmp_path / 'done')), pipes))
    process.start()
    with open(pipes[0]) as out, open(pipes[1]):
        out.readline()
    process.join(120)
    assert process.exitcode == 0
    assert (tmp_path / 'done').read_text() == 'done'


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='descriptors are closed in a process that was forked')
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    script = ('import os, sys\nos.close(1)\nos.close(2)\n'
              'sys.stdout = sys.__stdout__ = sys.stderr = sys.__stderr__ = None\n'  # as Python itself begins there
              'from autoreg_vit.engine.console import patient_streams\nwith patient_streams():\n'
              '    file = open(sys.argv[1], "w")\n    file.write(str(file.fileno()))\n    print("lost")\n')
    run = run_bare(script, tmp_path / 'file')
    assert run.returncode == 0, run.stderr
    assert int((tmp_path / 'file').read_text()) > 2
