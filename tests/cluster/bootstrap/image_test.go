package bootstrap

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
)

func writeImage(t *testing.T) []byte {
	t.Helper()
	folder := t.TempDir()
	program, out := filepath.Join(folder, "server"), filepath.Join(folder, "image.tar")
	if err := os.WriteFile(program, []byte("a static program"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := WriteImage([]string{"--program", program, "--name", "plimsoll.local/server:1", "--out", out}); err != nil {
		t.Fatal(err)
	}
	image, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func unpack(t *testing.T, archive []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for reader := tar.NewReader(bytes.NewReader(archive)); ; {
		header, err := reader.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[header.Name], err = io.ReadAll(reader); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAnImageHoldsItsProgramAndRunsItAsNobody(t *testing.T) {
	files := unpack(t, writeImage(t))
	var manifest []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(files["manifest.json"], &manifest); err != nil {
		t.Fatal(err)
	}
	var config struct {
		Config struct {
			Entrypoint []string
			User       string
		}
		Rootfs struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if err := json.Unmarshal(files[manifest[0].Config], &config); err != nil {
		t.Fatal(err)
	}
	layer := files[manifest[0].Layers[0]]
	if got, want := config.Rootfs.DiffIDs[0], fmt.Sprintf("sha256:%x", sha256.Sum256(layer)); got != want {
		t.Errorf("%s is not the layer's %s", got, want)
	}
	if manifest[0].RepoTags[0] != "plimsoll.local/server:1" || config.Config.Entrypoint[0] != "/server" || config.Config.User != "65532:65532" {
		t.Error(manifest, config)
	}
	if string(unpack(t, layer)["server"]) != "a static program" {
		t.Error("the program is not in the layer")
	}
}

func TestTheSameProgramGivesTheSameImage(t *testing.T) {
	if !bytes.Equal(writeImage(t), writeImage(t)) {
		t.Error("two images differ")
	}
}
