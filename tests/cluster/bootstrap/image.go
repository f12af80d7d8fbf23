package bootstrap

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
)

// WriteImage packs one static program as an image archive that containerd imports: `image --program FILE --name REFERENCE --out FILE`.
// The image's entry point is the program, its user 65532; the same program gives the same bytes.
func WriteImage(arguments []string) error {
	flags := flag.NewFlagSet("image", flag.ExitOnError)
	program := flags.String("program", "", "the static program")
	name := flags.String("name", "", "the image's reference, with its tag")
	out := flags.String("out", "", "the archive to write")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	if *program == "" || *name == "" || *out == "" {
		return errors.New("--program, --name and --out are needed")
	}
	content, err := os.ReadFile(*program)
	if err != nil {
		return err
	}
	entry := filepath.Base(*program)
	layer, err := archive([]file{{entry, 0o755, content}})
	if err != nil {
		return err
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       map[string]any{"Entrypoint": []string{"/" + entry}, "User": "65532:65532"},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal([]map[string]any{{"Config": "config.json", "RepoTags": []string{*name}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		return err
	}
	image, err := archive([]file{{"manifest.json", 0o644, manifest}, {"config.json", 0o644, config}, {"layer.tar", 0o644, layer}})
	if err != nil {
		return err
	}
	return os.WriteFile(*out, image, 0o644)
}

type file struct {
	name    string
	mode    int64
	content []byte
}

func archive(files []file) ([]byte, error) {
	var buffer bytes.Buffer
	writer := tar.NewWriter(&buffer)
	for _, file := range files {
		if err := writer.WriteHeader(&tar.Header{Name: file.name, Mode: file.mode, Size: int64(len(file.content))}); err != nil {
			return nil, err
		}
		if _, err := io.Copy(writer, bytes.NewReader(file.content)); err != nil {
			return nil, err
		}
	}
	if err := writer.Close(); err != nil {
		return nil, err
	}
	return buffer.Bytes(), nil
}
