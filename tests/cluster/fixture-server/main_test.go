package main

import (
	"bytes"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const content = "0123456789"

// serve starts the server on a folder with the file `digits`, beside which lies a file that nobody may get.
func serve(t *testing.T) string {
	t.Helper()
	parent := t.TempDir()
	folder := filepath.Join(parent, "served")
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{filepath.Join(folder, "digits"): content, filepath.Join(parent, "secret"): "secret"} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../secret", filepath.Join(folder, "leak")); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(newHandler(folder))
	t.Cleanup(server.Close)
	return server.URL
}

func get(t *testing.T, url string, headers ...string) (*http.Response, string, error) {
	t.Helper()
	request, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		request.Header.Set(headers[i], headers[i+1])
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response, string(body), err
}

func TestAFileIsServedWholeInPartsAndNotAgain(t *testing.T) {
	url := serve(t) + "/digits"
	whole, body, _ := get(t, url)
	tag := whole.Header.Get("ETag")
	if whole.StatusCode != http.StatusOK || body != content || tag == "" {
		t.Fatalf("%s %q %q", whole.Status, body, tag)
	}
	rest, body, _ := get(t, url, "Range", "bytes=7-", "If-Range", tag)
	if rest.StatusCode != http.StatusPartialContent || body != "789" || rest.Header.Get("Content-Range") != "bytes 7-9/10" {
		t.Errorf("%s %q %q", rest.Status, body, rest.Header.Get("Content-Range"))
	}
	other, body, _ := get(t, url, "Range", "bytes=7-", "If-Range", `"another"`)
	if other.StatusCode != http.StatusOK || body != content {
		t.Errorf("a range of another file: %s %q", other.Status, body)
	}
	known, body, _ := get(t, url, "If-None-Match", tag)
	if known.StatusCode != http.StatusNotModified || body != "" {
		t.Errorf("%s %q", known.Status, body)
	}
}

func TestNothingOutsideOfTheFolderIsServed(t *testing.T) {
	url := serve(t)
	for _, path := range []string{"/leak", "/cut?bytes=1&path=../secret", "/slow?seconds=0&path=leak", "/fail?times=0&path=../secret", "/", "/missing"} {
		response, body, _ := get(t, url+path)
		if response.StatusCode != http.StatusNotFound || strings.Contains(body, "secret\n") || body == "secret" {
			t.Errorf("%s: %s %q", path, response.Status, body)
		}
	}
}

func TestEndlessSendsAsManyBytesAsAskedForAndNoLength(t *testing.T) {
	response, body, err := get(t, serve(t)+"/endless?bytes=200000")
	if err != nil || len(body) != 200_000 || response.ContentLength != -1 {
		t.Errorf("%d bytes, length %d, %v", len(body), response.ContentLength, err)
	}
}

func TestStatusAnswersWithTheCode(t *testing.T) {
	url := serve(t)
	for path, code := range map[string]int{"/status/403": 403, "/status/503": 503, "/status/99": 400, "/status/x": 400} {
		if response, _, _ := get(t, url+path); response.StatusCode != code {
			t.Errorf("%s: %s", path, response.Status)
		}
	}
}

func TestSlowIsLate(t *testing.T) {
	begun := time.Now()
	_, body, _ := get(t, serve(t)+"/slow?seconds=0.2&path=digits")
	if body != content || time.Since(begun) < 200*time.Millisecond {
		t.Errorf("%q after %s", body, time.Since(begun))
	}
}

func TestCutDropsTheConnectionAfterSoManyBytes(t *testing.T) {
	response, body, err := get(t, serve(t)+"/cut?path=digits&bytes=4")
	if body != "0123" || response.ContentLength != 10 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%q of %d, %v", body, response.ContentLength, err)
	}
}

func TestFailAnswersOnceItHasFailedSoOften(t *testing.T) {
	url := serve(t) + "/fail?path=digits&times=2"
	var codes []int
	for range 3 {
		response, _, _ := get(t, url)
		codes = append(codes, response.StatusCode)
	}
	if codes[0] != 503 || codes[1] != 503 || codes[2] != 200 {
		t.Error(codes)
	}
}

func TestEveryRequestIsWrittenDown(t *testing.T) {
	var written bytes.Buffer
	log.SetOutput(&written)
	defer log.SetOutput(os.Stdout)
	server := httptest.NewServer(logged(http.NotFoundHandler()))
	defer server.Close()
	get(t, server.URL+"/digits", "Range", "bytes=7-")
	if !strings.Contains(written.String(), `GET /digits range="bytes=7-"`) {
		t.Error(written.String())
	}
}
