"""Pushing a trained model, for real, to a hub of our own on the loopback interface."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a push needs; files are kept in `server.files`."""

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if "whoami" in self.path:
            return self.answer({"name": "tester", "type": "user", "orgs": []})
        self.answer({"id": "tester/policy", "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = f"http://{self.headers['Host']}/tester/policy"
        if self.path.endswith("/repos/create"):
            return self.answer({"url": url, "name": "tester/policy", "id": "tester/policy"})
        if self.path.endswith("/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        for line in body.splitlines():
            record = json.loads(line)
            if record["key"] == "file":
                self.server.files[record["value"]["path"]] = base64.b64decode(record["value"]["content"])
        self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{url}/commit/{'0' * 40}"})

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def push(output_dir: str) -> None:
    """Train a tiny policy for a step and push it; runs in a process of its own."""
    import tiny

    from igpo_trl import IGPOConfig, IGPOTrainer

    class Trainer(tiny.Scripted, IGPOTrainer):
        scripts = [[tiny.call("Paris"), tiny.answer("Paris")], ["?"]]

    options = {"hub_model_id": "tester/policy", "hub_token": "hf_none", "per_device_train_batch_size": 2}
    trainer = tiny.make_trainer(Trainer, IGPOConfig, output_dir, **options)
    trainer.train()
    trainer.push_to_hub(dataset_name="hotpotqa/hotpot_qa")


def test_push_to_hub_says_igpo_and_cites_the_paper(hub, tmp_path, repository):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(repository / "src"), str(repository / "tests")]),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, __file__, str(tmp_path / "policy")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    card = hub.files["README.md"].decode()
    header, text = card.split("---", 2)[1:]
    assert "- igpo" in header
    assert "- trl" in header
    assert "trained with IGPO" in text
    assert 'from_pretrained("tester/policy"' in text
    assert "![" in text and "beliefs_by_turn.png" in hub.files
    assert str(tmp_path) not in card
    assert "2510.14967" in text
    assert "@inproceedings{wang2026igpo" in text
    assert "Information Gain-based Policy Optimization" in text
    assert "GRPO" not in text
    assert Path(tmp_path / "policy" / "README.md").read_text(encoding="utf-8") == card


if __name__ == "__main__":
    push(sys.argv[1])
