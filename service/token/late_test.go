package token

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// silentSource is a source whose first step, at the Kubernetes API, never answers.
type silentSource struct{}

func (silentSource) Token(ctx context.Context, _ Request) (Token, error) {
	<-ctx.Done()
	return Token{}, ctx.Err()
}

// Where a mint ended before Google was asked, the error does not speak of Google.
func TestLateMintDoesNotBlameGoogle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, wait := range []time.Duration{time.Second, time.Hour} { // before and after the mint's own end
			ctx, cancel := context.WithTimeout(t.Context(), wait)
			c := NewCache(CacheOptions{Source: silentSource{}})
			_, err := c.Token(ctx, AccessToken(workload.ServiceAccount{Namespace: "ns", Name: "a"}, workload.Account{}, nil))
			cancel()
			if !errors.Is(err, ErrUnavailable) || strings.Contains(err.Error(), "Google") {
				t.Errorf("after %s: %v", wait, err)
			}
		}
	})
}
