package kmsclient

import (
	"context"
	"time"
)

// Describer is the optional interface of a backend whose KMS reports more about a key than Status
// does.
type Describer interface {
	// Describe returns what the KMS says of the key, in whatever state the key is.
	Describe(ctx context.Context) (*KeyInfo, error)
}

// KeyIDParser is the optional interface of a backend whose key IDs name a version of a key. All
// versions of a key are disabled and deleted as one.
type KeyIDParser interface {
	// KeyOf returns the name of the key in a key ID. It accepts whatever a stored value can hold.
	KeyOf(keyID string) string
}

// SessionHolder is the optional interface of a backend whose credentials end and are renewed.
type SessionHolder interface {
	// CredentialsExpire returns when the credentials in use end, or zero if they do not say.
	CredentialsExpire() time.Time
	// CredentialsLate reports whether a renewal is overdue or has failed.
	CredentialsLate() bool
}

// FileChecker is the optional interface of a backend that reads files again when they change.
type FileChecker interface {
	// CheckFiles returns why the newest files are not in use, or nil if they are. It is called
	// every few seconds.
	CheckFiles() error
}

// KeyInfo is what a KMS says of a key. What a KMS does not say is zero.
type KeyInfo struct {
	KeyID     string // as new values will name it
	RequestID string // the KMS' own id of the request that returned this

	State           string // in the KMS' own words, e.g. "Enabled"
	Usable          bool   // whether the key encrypts and decrypts in this state
	Spec            string // e.g. "Aliyun_AES_256"
	ProtectionLevel string // e.g. "SOFTWARE" or "HSM"
	Creator         string // an account, or the service that the key was made for
	OfService       bool   // the key belongs to a service of the cloud and not to an account

	AutomaticRotation  string  // in the KMS' own words
	Rotation           Setting // whether the KMS rotates the key
	DeletionProtection Setting // whether the KMS refuses to schedule the key's deletion

	NextRotation      time.Time
	DeleteAt          time.Time // when a key that is pending deletion will be deleted
	MaterialExpiresAt time.Time // when imported key material will be deleted
}

// Setting is a setting of a key.
type Setting int

// The settings' values.
const (
	Unsupported Setting = iota // the KMS does not have it for this key
	Off
	On
)

// SettingOf returns On or Off.
func SettingOf(on bool) Setting {
	if on {
		return On
	}
	return Off
}
