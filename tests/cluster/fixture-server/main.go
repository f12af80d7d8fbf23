// Command fixture-server serves a folder over HTTP to tests that run against pods, and misbehaves on request:
//
//	/endless?bytes=N      N bytes (without end when left out), with no Content-Length, in constant memory
//	/status/CODE          an empty answer with that status
//	/slow?seconds=N&path=P  the file P of the folder (or nothing), N seconds late
//	/cut?path=P&bytes=N   the headers of the file P, N bytes of it, then the connection is dropped
//	/fail?path=P&times=N  503 for the first N requests of P, then the file
//
// All other paths are files of --folder, with Range, ETag and If-None-Match. Every request is written to standard output.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
)

func main() {
	folder := flag.String("folder", "/fixtures", "the folder to serve")
	address := flag.String("address", ":8080", "where to listen")
	flag.Parse()
	log.SetOutput(os.Stdout)
	server := &http.Server{Addr: *address, Handler: logged(newHandler(*folder)), ReadHeaderTimeout: 10 * time.Second}
	log.Printf("serving %s at %s", *folder, *address)
	log.Fatal(server.ListenAndServe())
}

// fixtures serves the files below root; a path cannot leave it.
type fixtures struct {
	root     *os.Root
	mutex    sync.Mutex
	failures map[string]int
}

func newHandler(folder string) http.Handler {
	root, err := os.OpenRoot(folder)
	if err != nil {
		log.Fatal(err)
	}
	f := &fixtures{root: root, failures: map[string]int{}}
	mux := http.NewServeMux()
	mux.HandleFunc("/endless", endless)
	mux.HandleFunc("/status/{code}", status)
	mux.HandleFunc("/slow", f.slow)
	mux.HandleFunc("/cut", f.cut)
	mux.HandleFunc("/fail", f.fail)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { f.serve(w, r, r.URL.Path[1:]) })
	return mux
}

func logged(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		log.Printf("%s %s range=%q", r.Method, r.URL, r.Header.Get("Range"))
		next.ServeHTTP(w, r)
	})
}

func (f *fixtures) serve(w http.ResponseWriter, r *http.Request, path string) {
	file, info, err := f.open(path)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer file.Close()
	w.Header().Set("ETag", fmt.Sprintf(`"%x-%x"`, info.ModTime().UnixNano(), info.Size()))
	http.ServeContent(w, r, info.Name(), info.ModTime(), file)
}

func (f *fixtures) open(path string) (*os.File, os.FileInfo, error) {
	file, err := f.root.Open(path)
	if err != nil {
		return nil, nil, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a file")
	}
	if err != nil {
		file.Close()
		return nil, nil, err
	}
	return file, info, nil
}

func endless(w http.ResponseWriter, r *http.Request) {
	remaining := int64(1<<63 - 1)
	if text := r.URL.Query().Get("bytes"); text != "" {
		var err error
		if remaining, err = strconv.ParseInt(text, 10, 64); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	block := make([]byte, 64<<10)
	for remaining > 0 {
		written, err := w.Write(block[:min(remaining, int64(len(block)))])
		if err != nil {
			return
		}
		remaining -= int64(written)
	}
}

func status(w http.ResponseWriter, r *http.Request) {
	code, err := strconv.Atoi(r.PathValue("code"))
	if err != nil || code < 200 || code > 599 {
		http.Error(w, "the code must lie between 200 and 599", http.StatusBadRequest)
		return
	}
	w.WriteHeader(code)
}

func (f *fixtures) slow(w http.ResponseWriter, r *http.Request) {
	seconds, err := strconv.ParseFloat(r.URL.Query().Get("seconds"), 64)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	select {
	case <-time.After(time.Duration(seconds * float64(time.Second))):
	case <-r.Context().Done():
		return
	}
	if path := r.URL.Query().Get("path"); path != "" {
		f.serve(w, r, path)
	}
}

func (f *fixtures) cut(w http.ResponseWriter, r *http.Request) {
	count, err := strconv.ParseInt(r.URL.Query().Get("bytes"), 10, 64)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	file, info, err := f.open(r.URL.Query().Get("path"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer file.Close()
	w.Header().Set("Content-Length", strconv.FormatInt(info.Size(), 10))
	if _, err := io.CopyN(w, file, min(count, info.Size())); err != nil {
		return
	}
	if err := http.NewResponseController(w).Flush(); err != nil {
		return
	}
	panic(http.ErrAbortHandler)
}

func (f *fixtures) fail(w http.ResponseWriter, r *http.Request) {
	path := r.URL.Query().Get("path")
	times, err := strconv.Atoi(r.URL.Query().Get("times"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	f.mutex.Lock()
	seen := f.failures[path]
	f.failures[path] = seen + 1
	f.mutex.Unlock()
	if seen < times {
		http.Error(w, "not yet", http.StatusServiceUnavailable)
		return
	}
	f.serve(w, r, path)
}
