package googletest

import (
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// response is a method's answer, before any fault.
type response struct {
	status int
	header http.Header
	body   any    // as JSON
	raw    string // instead of body
	secret string // of the request
}

const bodyLimit = 1 << 20

// serve finds the method, applies faults, and writes the one answer.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	method, email, ok := route(r.URL)
	if !ok || r.Method != http.MethodPost { // Google too answers a wrong HTTP method with 404
		write(w, notFound, false)
		return
	}
	fault := s.called(method)
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, bodyLimit))
	if err != nil {
		write(w, iamError(http.StatusBadRequest, "INVALID_ARGUMENT", "Request payload size exceeds the limit."), false)
		return
	}
	if fault.Latency > 0 {
		timer := time.NewTimer(fault.Latency)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-r.Context().Done():
			return
		}
	}
	if fault.Drop {
		panic(http.ErrAbortHandler)
	}
	var answer response
	if method == Exchange {
		answer = s.exchange(r, string(body))
	} else {
		answer = s.generate(r, method, email, body)
	}
	if fault.Status != 0 {
		f := fault.response(method)
		f.raw = strings.ReplaceAll(f.raw, "%TOKEN%", answer.secret)
		answer = f
	}
	write(w, answer, fault.Truncate)
}

var notFound = response{status: http.StatusNotFound, raw: "<!DOCTYPE html><title>Error 404 (Not Found)!!1</title>\n",
	header: http.Header{"Content-Type": {"text/html; charset=UTF-8"}}}

func write(w http.ResponseWriter, a response, truncate bool) {
	raw := []byte(a.raw)
	if a.raw == "" {
		raw, _ = json.Marshal(a.body)
	}
	h := w.Header()
	h.Set("Content-Type", "application/json; charset=UTF-8")
	for k, v := range a.header {
		h[k] = v
	}
	h.Set("Content-Length", strconv.Itoa(len(raw)))
	w.WriteHeader(a.status)
	if truncate {
		_, _ = w.Write(raw[:len(raw)/2])
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		panic(http.ErrAbortHandler)
	}
	_, _ = w.Write(raw)
}
