package main

import (
	"encoding/json"
	"net/http"
	"strings"
)

// answerStorage answers as Cloud Storage does.
func answerStorage(w http.ResponseWriter, r *http.Request) {
	token, found := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	bucket := map[string]any{"kind": "storage#bucket", "id": token, "name": token, "location": "EU",
		"timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z"}
	switch {
	case !found:
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = w.Write([]byte(`{"error":{"code":401,"message":"Anonymous caller does not have storage.buckets.get access."}}`))
	case strings.HasSuffix(r.URL.Path, "/b"):
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "storage#buckets", "items": []any{bucket}})
	default:
		_ = json.NewEncoder(w).Encode(bucket)
	}
}
