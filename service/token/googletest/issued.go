package googletest

import (
	"crypto/rand"
	"encoding/base64"
	"slices"
	"time"
)

// Issued is what the server knows of a token that it issued.
type Issued struct {
	Method       Method
	Subject      string   // the google.subject of the caller, also of an impersonated account's token
	Email        string   // the Google service account; "" for a federated token
	Scopes       []string // of an access token
	Audience     string   // of an ID token; of a federated token the provider
	QuotaProject string   // the request's header x-goog-user-project
	Expires      time.Time
}

// Account makes a Google service account without any binding. An account that was never made does
// not exist: 404.
func (s *Server) Account(email string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.account(email)
}

func (s *Server) account(email string) map[string]bool {
	policy := s.policies[email]
	if policy == nil {
		policy = map[string]bool{}
		s.policies[email] = policy
	}
	return policy
}

// Allow gives the subject ("system:serviceaccount:ns:name") roles/iam.workloadIdentityUser on the
// account.
func (s *Server) Allow(subject, email string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.account(email)[subject] = true
}

// Deny removes what Allow gave.
func (s *Server) Deny(subject, email string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.account(email), subject)
}

// Lookup returns what was issued as this token, also after it expired.
func (s *Server) Lookup(value string) (Issued, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.issued[value]
	return i, ok
}

// Revoke makes an issued token invalid.
func (s *Server) Revoke(value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.issued, value)
}

// Calls counts the requests to a method, with refused and faulty ones.
func (s *Server) Calls(m Method) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[m]
}

// Secrets lists every secret that the server received or made: each subject token and each issued
// token.
func (s *Server) Secrets() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.secrets)
}

func (s *Server) secret(value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secrets = append(s.secrets, value)
}

func (s *Server) issue(value string, i Issued) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.issued[value] = i
	s.secrets = append(s.secrets, value)
}

// opaque makes an access token of about a real one's length.
func opaque() string {
	raw := make([]byte, 150)
	_, _ = rand.Read(raw)
	return "ya29." + base64.RawURLEncoding.EncodeToString(raw)
}
