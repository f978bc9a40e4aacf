package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/go-jose/go-jose/v4"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/api"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/test/node/report"
)

var reportsFile = filepath.Join(worldDir, "reports.jsonl")

// world runs the stand-in for Google, which verifies every token of the cluster and knows the owner
// of every token that it issued. It judges each report, and writes it to reports.jsonl without the
// token.
func world(ctx context.Context) error {
	if err := os.MkdirAll(worldDir, 0o755); err != nil {
		return err
	}
	l, err := net.Listen("tcp", googleAddr)
	if err != nil {
		return err
	}
	keys := new(keySet)
	google, err := googletest.New(googletest.Options{Listener: l, Providers: map[string]googletest.Provider{
		audience: {Issuer: serverURL, JWKS: func() jose.JSONWebKeySet { return keys.get(ctx) }},
	}})
	if err != nil {
		return err
	}
	defer google.Close()
	if err := google.WriteCA(googleCA); err != nil {
		return err
	}
	out, err := os.OpenFile(reportsFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	mux := http.NewServeMux()
	mux.HandleFunc("POST /allow", func(w http.ResponseWriter, r *http.Request) {
		google.Allow(r.FormValue("subject"), r.FormValue("email"))
	})
	mux.HandleFunc("POST /{$}", func(w http.ResponseWriter, r *http.Request) {
		var p report.Report
		if err := json.NewDecoder(r.Body).Decode(&p); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		judge(&p, google)
		b, err := json.Marshal(p)
		if err == nil {
			mu.Lock()
			defer mu.Unlock()
			_, err = out.Write(append(b, '\n'))
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	reports, err := net.Listen("tcp", nodeAddress+":9999")
	if err != nil {
		return err
	}
	s := &http.Server{Handler: mux}
	go func() {
		<-ctx.Done()
		_ = s.Close() // the machine ends
	}()
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		return err
	}
	if err := s.Serve(reports); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return out.Close()
}

// judge replaces the token by the outcome.
func judge(p *report.Report, google *googletest.Server) {
	value := p.Token
	p.Token = ""
	switch {
	case p.Status == 0:
		p.Outcome = report.Lost
		return
	case p.Status != http.StatusOK:
		p.Outcome = report.Refused
		return
	}
	issued, known := google.Lookup(value)
	p.Identity = issued.Subject + " " + issued.Email
	if p.Outcome = report.OK; !known || issued.Subject != subject(p.Namespace, p.Account) || issued.Email != p.Email {
		p.Outcome = report.Wrong
		p.Text = fmt.Sprintf("the token is of %q; issued by the stand-in for Google: %v", p.Identity, known)
	}
}

func subject(namespace, account string) string {
	return "system:serviceaccount:" + namespace + ":" + account
}

// keySet has the cluster's keys. They are read once: Google keeps them while the cluster is away.
type keySet struct {
	mu   sync.Mutex
	keys jose.JSONWebKeySet
}

func (k *keySet) get(ctx context.Context) jose.JSONWebKeySet {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.keys.Keys) > 0 {
		return k.keys
	}
	admin, err := server().Caller(api.Admin)
	if err == nil {
		err = admin.Get(ctx, "/openid/v1/jwks", &k.keys)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "world: the cluster's keys cannot be read:", err)
	}
	return k.keys
}

func server() api.Server { return api.Server{URL: serverURL, Dir: clusterDir} }
