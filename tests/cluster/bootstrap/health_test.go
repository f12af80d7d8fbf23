package bootstrap

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
)

// check returns what the health check prints.
func check(t *testing.T, arguments ...string) (string, error) {
	t.Helper()
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout := os.Stdout
	os.Stdout = writer
	failed := CheckHealth(arguments)
	os.Stdout = stdout
	writer.Close()
	printed, err := io.ReadAll(reader)
	if err != nil {
		t.Fatal(err)
	}
	return string(printed), failed
}

func TestEachIsAskedOnceAndSaysWhatIsWrong(t *testing.T) {
	well := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer well.Close()
	ill := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "etcd failed\nand more", http.StatusInternalServerError)
	}))
	defer ill.Close()
	printed, err := check(t, "api="+well.URL, "etcd="+ill.URL, "gone=http://127.0.0.1:1")
	lines := strings.Split(strings.TrimSpace(printed), "\n")
	if err == nil || len(lines) != 3 || lines[0] != "api ok" || lines[1] != "etcd 500 Internal Server Error: etcd failed" {
		t.Errorf("%v: %q", err, lines)
	}
	if !strings.HasPrefix(lines[2], "gone ") || !strings.Contains(lines[2], "refused") {
		t.Errorf("%q", lines[2])
	}
}

func TestItWaitsUntilAllAreWell(t *testing.T) {
	var asked atomic.Int32
	late := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) < 3 {
			http.Error(w, "starting", http.StatusServiceUnavailable)
		}
	}))
	defer late.Close()
	printed, err := check(t, "--wait=20s", "late="+late.URL)
	if err != nil || printed != "late ok\n" || asked.Load() != 3 {
		t.Errorf("%v: %q after %d", err, printed, asked.Load())
	}
}
