//go:build unix

package localpg

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// elsewhere holds the clusters whose folders the user Postgres runs as cannot
// reach.
const elsewhere = "/var/lib/cedarpost"

// account is the user that root runs Postgres as. A nil account is ourselves.
type account struct {
	uid, gid uint32
}

// stepDown returns the account to run as, nil unless we are root.
func stepDown() (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		u, err = user.Lookup("nobody")
	}
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &account{uint32(uid), uint32(gid)}, nil
}

// StepDown returns what a program that must not run as root is to run as, the same
// that Postgres runs as; nil unless we are root.
func StepDown() (*syscall.Credential, error) {
	a, err := stepDown()
	return a.credential(), err
}

func (a *account) chown(path string) error {
	if a == nil {
		return nil
	}
	return os.Chown(path, int(a.uid), int(a.gid))
}

// credential is what a child process runs as.
func (a *account) credential() *syscall.Credential {
	if a == nil {
		return nil
	}
	return &syscall.Credential{Uid: a.uid, Gid: a.gid}
}

// canReach reports whether the account may pass through a folder and all those
// above it. Access control lists are not looked at.
func (a *account) canReach(dir string) (bool, error) {
	if a == nil {
		return true, nil
	}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false, err
	}
	for {
		info, err := os.Stat(dir)
		if err != nil {
			return false, err
		}
		stat := info.Sys().(*syscall.Stat_t)
		mode := info.Mode().Perm()
		switch {
		case stat.Uid == a.uid:
			mode >>= 6
		case stat.Gid == a.gid:
			mode >>= 3
		}
		if mode&1 == 0 {
			return false, nil
		}
		if dir == filepath.Dir(dir) {
			return true, nil
		}
		dir = filepath.Dir(dir)
	}
}

// place finds the folder of the cluster, or makes it.
func (s *Server) place() error {
	link := filepath.Join(s.config.Dir, "postgres")
	target, err := filepath.EvalSymlinks(link)
	if err == nil {
		s.cluster = target
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	reach, err := s.owner.canReach(s.config.Dir)
	if err != nil {
		return err
	}
	if reach {
		s.cluster = link
		return s.makeCluster()
	}

	if err := os.MkdirAll(elsewhere, 0o755); err != nil {
		return err
	}
	sum := sha256.Sum256([]byte(s.config.Dir))
	s.cluster = filepath.Join(elsewhere, hex.EncodeToString(sum[:6]))
	if _, err := os.Lstat(s.cluster); err == nil {
		// Of a folder that had this name before, and may live on under another.
		if s.cluster, err = os.MkdirTemp(elsewhere, filepath.Base(s.cluster)+"-"); err != nil {
			return err
		}
	}
	if err := s.makeCluster(); err != nil {
		return err
	}
	os.Remove(link) // one that leads nowhere
	return os.Symlink(s.cluster, link)
}

func (s *Server) makeCluster() error {
	if err := os.MkdirAll(s.cluster, 0o700); err != nil {
		return err
	}
	return s.owner.chown(s.cluster)
}
